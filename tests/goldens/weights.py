"""Weights and tokens by rule instead of by file: every name and seed gives the same numbers.

NumPy only. Names and shapes are those of transformers' Gemma3ForCausalLM, whose linear layers
hold [out, in].
"""

import zlib

import numpy as np


def _rng(name: str, seed: int) -> np.random.Generator:
    return np.random.default_rng([zlib.crc32(name.encode()), seed])


def shapes(case: dict) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter of a case."""
    D, F, H = case["embed_dim"], case["mlp_dim"], case["head_dim"]
    query, key = case["num_heads"] * H, case["num_kv_heads"] * H
    layer = {
        "self_attn.q_proj": (query, D),
        "self_attn.k_proj": (key, D),
        "self_attn.v_proj": (key, D),
        "self_attn.o_proj": (D, query),
        "self_attn.q_norm": (H,),
        "self_attn.k_norm": (H,),
        "mlp.gate_proj": (F, D),
        "mlp.up_proj": (F, D),
        "mlp.down_proj": (D, F),
        "input_layernorm": (D,),
        "post_attention_layernorm": (D,),
        "pre_feedforward_layernorm": (D,),
        "post_feedforward_layernorm": (D,),
    }
    table = {"model.embed_tokens.weight": (case["vocab_size"], D)}
    for i in range(case["num_layers"]):
        table |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    table["model.norm.weight"] = (D,)
    if not case["tied_embedding"]:
        table["lm_head.weight"] = (case["vocab_size"], D)
    return table


def make_weight(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """float32. Norm weights are far from 0, so that w in place of 1 + w would be seen."""
    scale = 0.3 if len(shape) == 1 else shape[1] ** -0.5
    return (_rng(name, seed).standard_normal(shape) * scale).astype(np.float32)


def make_weights(case: dict) -> dict[str, np.ndarray]:
    return {name: make_weight(name, shape, case["seed"]) for name, shape in shapes(case).items()}


def make_tokens(case: dict) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, labels), int32 [batch, seq_len]; a label is the token that follows."""
    size = (case["batch"], case["seq_len"] + 1)
    ids = _rng("tokens", case["seed"]).integers(0, case["vocab_size"], size, dtype=np.int32)
    return ids[:, :-1], ids[:, 1:]


def probe(name: str, gradient: np.ndarray, seed: int) -> np.ndarray:
    """float64 [2]: a gradient's norm and its product with a fixed random direction.

    The norm alone would not see a transposed or permuted gradient.
    """
    gradient = np.asarray(gradient, np.float64)
    direction = _rng(f"probe {name}", seed).standard_normal(gradient.shape)
    return np.array([np.linalg.norm(gradient), (gradient * direction).sum()])
