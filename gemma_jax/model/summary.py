"""What a model is made of, without allocating any of it."""

from typing import Any

from gemma_jax.model.cache import cache_bytes, num_slots
from gemma_jax.model.config import (
    ModelConfig,
    count_parameters,
    flops_per_token,
    parameter_table,
)
from gemma_jax.settings import to_json


def describe(config: ModelConfig, seq_len: int) -> dict[str, Any]:
    """Settings, layers, parameters, training FLOPs a token and KV-cache bytes by context.

    `kv_cache_bytes` maps a context length to the bytes that one sequence of it holds over all
    layers; `layers` holds each layer's letter, window, RoPE base and cache bytes at the full
    context.
    """
    count = count_parameters(config)
    contexts = [1024 * 4**i for i in range(8) if 1024 * 4**i < config.max_seq_len]
    contexts.append(config.max_seq_len)
    full = cache_bytes(config, config.max_seq_len)
    layers = [
        {
            "letter": letter,
            "window": config.window(letter),
            "rope_base": config.rope(letter)[0],
            "rope_scale": config.rope(letter)[1],
            "cache_slots": num_slots(config, letter, config.max_seq_len),
            "cache_bytes": size,
        }
        for letter, size in zip(config.layer_letters, full, strict=True)
    ]
    return {
        "model": to_json(config),
        "pattern": config.layer_letters,
        "layers": layers,
        "parameters": {
            "total": count.total,
            "embedding": count.embedding,
            "other": count.other,
            "table": [
                {"what": what, "size": size, "times": times}
                for what, size, times in parameter_table(config)
            ],
        },
        "seq_len": seq_len,
        "flops_per_token": flops_per_token(config, seq_len),
        "kv_cache_bytes": {str(n): sum(cache_bytes(config, n)) for n in contexts},
    }


def text(described: dict[str, Any]) -> str:
    """`describe` for a terminal."""
    model, parameters = described["model"], described["parameters"]
    lines = [
        f"layers      {model['num_layers']}: {described['pattern']}",
        f"shape       embed {model['embed_dim']}, mlp {model['mlp_dim']}, "
        f"{model['num_heads']} query and {model['num_kv_heads']} kv heads of {model['head_dim']}, "
        f"vocabulary {model['vocab_size']:,}",
        f"window      {model['sliding_window']} (local layers), context {model['max_seq_len']:,}",
        "",
        f"{'parameters':<24}{'each':>16}{'times':>8}{'all':>18}",
    ]
    for row in parameters["table"]:
        size, times = row["size"], row["times"]
        lines.append(f"{row['what']:<24}{size:>16,}{times:>8}{size * times:>18,}")
    for name, label in (("embedding", "all embedding"), ("other", "all other"), ("total", "total")):
        lines.append(f"{label:<48}{parameters[name]:>18,}")
    lines += [
        "",
        f"training FLOPs a token at {described['seq_len']:,} tokens a sequence: "
        f"{described['flops_per_token'] / 1e9:.3f} G",
        "",
        "KV cache of one sequence",
    ]
    lines += [
        f"{int(context):>10,} tokens {size / 2**20:>12,.2f} MiB"
        for context, size in described["kv_cache_bytes"].items()
    ]
    return "\n".join(lines)
