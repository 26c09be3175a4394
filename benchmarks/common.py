"""What the peers' scripts share: options, tokens, and the one line of JSON that each prints.

NumPy only, and nothing of gemma_jax: each script runs in the environment of its own library.
"""

import argparse
import importlib.metadata
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

# The keys of gemma_jax.bench.timing.ROW_KEYS, which a test compares; None: not measured.
ROW_KEYS = (
    *("what", "batch", "seq_len", "documents", "compute_dtype", "weights_dtype", "steps"),
    *("repeats", "seconds", "tokens_per_s", "mfu", "loss", "data_wait", "peak_bytes"),
    *("program_bytes", "host_peak_bytes", "compile_s", "compile_cached_s", "parts", "busy"),
)

# Gemma 3 270M, in the words of gemma_jax's ModelConfig.
GEMMA3_270M = {
    "vocab_size": 262_144,
    "embed_dim": 640,
    "mlp_dim": 2048,
    "num_layers": 18,
    "num_heads": 4,
    "num_kv_heads": 1,
    "head_dim": 256,
    "max_seq_len": 32_768,
    "attn_pattern": "LLLLLG",
    "sliding_window": 512,
    "local_rope_base": 10_000.0,
    "global_rope_base": 1_000_000.0,
    "norm_eps": 1e-6,
}


def parser(description: str | None, *, batch: int, seq_len: int, steps: int) -> Any:
    found = argparse.ArgumentParser(description=description)
    found.add_argument("--batch", type=int, default=batch)
    found.add_argument("--seq-len", type=int, default=seq_len, help="tokens, or a prompt's")
    found.add_argument("--steps", type=int, default=steps, help="a repeat; or new tokens a row")
    found.add_argument("--repeats", type=int, default=3)
    found.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    found.add_argument(
        "--model",
        type=json.loads,
        default=GEMMA3_270M,
        help="settings of a gemma_jax ModelConfig as JSON; Gemma 3 270M by default",
    )
    return found


def letters(model: dict[str, Any]) -> str:
    """The letter of each layer, L (window) or G (everything before)."""
    pattern, layers = model["attn_pattern"], model["num_layers"]
    return (pattern * layers)[:layers]


def refuse(model: dict[str, Any], plain: dict[str, Any]) -> None:
    """Ends where a setting differs from the only value that the library knows."""
    for name, value in plain.items():
        if model.get(name, value) != value:
            sys.exit(f"this peer has no {name}={model[name]!r}")


def zipf_tokens(count: int, vocab_size: int, seed: int = 0) -> np.ndarray:
    """int64 [count]: the same tokens that gemma_jax draws (gemma_jax/bench/inputs.py)."""
    rng = np.random.default_rng(seed)
    ids = 1 + rng.permutation(vocab_size - 1)
    below = np.cumsum(1 / np.arange(1, vocab_size))
    return ids[np.searchsorted(below, rng.random(count) * below[-1], side="right")]


def batches(options: argparse.Namespace, count: int) -> np.ndarray:
    """int64 [count, B, T]."""
    shape = (count, options.batch, options.seq_len)
    return zipf_tokens(int(np.prod(shape)), options.model["vocab_size"]).reshape(shape)


def repeated(run: Callable[[], Any], repeats: int) -> list[float]:
    """Seconds of each repeat of `run`, which returns when its work is done."""
    return [timed(run) for _ in range(repeats)]


def timed(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def row(
    options: argparse.Namespace,
    what: str,
    times: list[float],
    tokens: int,
    steps: int,
    **known: Any,
) -> dict[str, Any]:
    """A row of `times`, each of a repeat of `steps` steps that dealt with `tokens` tokens."""
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = dict.fromkeys(ROW_KEYS) | {
        "what": what,
        "batch": options.batch,
        "seq_len": options.seq_len,
        "documents": 1,
        "compute_dtype": options.dtype,
        "weights_dtype": options.dtype,
        "steps": steps,
        "repeats": options.repeats,
        "seconds": spread([seconds / steps for seconds in times]),
        "tokens_per_s": spread([tokens / seconds for seconds in times]),
        "host_peak_bytes": host if sys.platform == "darwin" else host * 1024,
    }
    return found | known


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def emit(name: str, device: str, packages: tuple[str, ...], rows: list[dict[str, Any]]) -> None:
    versions = {package: importlib.metadata.version(package) for package in packages}
    print(json.dumps({"name": name, "device": device, "versions": versions, "rows": rows}))
