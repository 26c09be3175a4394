"""A Hugging Face Gemma 3 with random weights, of the shape that gemma_jax names."""

from typing import Any

import common
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def build(model: dict[str, Any], dtype: str) -> Any:
    """Weights of `dtype` on the GPU where there is one, with the library's own attention (SDPA)."""
    plain = {"qk_norm": True, "post_norms": True, "tied_embedding": True, "local_rope_scale": 1.0}
    common.refuse(model, plain)
    kinds = {"L": "sliding_attention", "G": "full_attention"}
    query_scale = model.get("query_scale") or model["head_dim"] ** -0.5
    ropes = {
        "sliding_attention": {"rope_type": "default", "rope_theta": model["local_rope_base"]},
        "full_attention": _global_rope(model),
    }
    config = Gemma3TextConfig(
        vocab_size=model["vocab_size"],
        hidden_size=model["embed_dim"],
        intermediate_size=model["mlp_dim"],
        num_hidden_layers=model["num_layers"],
        num_attention_heads=model["num_heads"],
        num_key_value_heads=model["num_kv_heads"],
        head_dim=model["head_dim"],
        max_position_embeddings=model["max_seq_len"],
        sliding_window=model["sliding_window"],
        query_pre_attn_scalar=round(query_scale**-2),  # its setting is a whole number
        rms_norm_eps=model["norm_eps"],
        attn_logit_softcapping=model.get("attn_softcap"),
        final_logit_softcapping=model.get("final_softcap"),
        layer_types=[kinds[letter] for letter in common.letters(model)],
        rope_parameters=ropes,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    return Gemma3ForCausalLM(config).to(device=DEVICE, dtype=getattr(torch, dtype))


def _global_rope(model: dict[str, Any]) -> dict[str, Any]:
    base, scale = model["global_rope_base"], model.get("global_rope_scale", 1.0)
    if scale == 1.0:
        return {"rope_type": "default", "rope_theta": base}
    return {"rope_type": "linear", "rope_theta": base, "factor": scale}


def wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def peak_bytes() -> int | None:
    return torch.cuda.max_memory_allocated() if DEVICE == "cuda" else None


def device_name() -> str:
    return f"1 x {torch.cuda.get_device_name()}" if DEVICE == "cuda" else "1 x cpu"
