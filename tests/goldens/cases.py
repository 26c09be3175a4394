"""The small random models whose numbers are kept here, in the field names of ModelConfig.

Plain Python, so that the script that makes the numbers runs in an environment without jax.
"""

_COMMON = {
    "vocab_size": 96,
    "embed_dim": 32,
    "mlp_dim": 48,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "sliding_window": 5,
    "local_rope_base": 10_000.0,
    "local_rope_scale": 1.0,
    "global_rope_base": 1_000_000.0,
    "global_rope_scale": 1.0,
    "query_scale": 8**-0.5,
    "attn_softcap": None,
    "final_softcap": None,
    "tied_embedding": True,
    "norm_eps": 1e-6,
}

# name: (what differs from _COMMON, sequences, tokens a sequence). Windows are mostly shorter than
# the text, which then runs over several of them.
_CASES: dict[str, tuple[dict, int, int]] = {
    "global_only": ({"attn_pattern": "G", "num_layers": 3}, 2, 24),
    "local_only": ({"attn_pattern": "L", "num_layers": 3, "num_kv_heads": 4}, 2, 32),
    "window_of_one": ({"attn_pattern": "L", "num_layers": 2, "sliding_window": 1}, 1, 12),
    "one_to_one": (
        {
            "attn_pattern": "LG",
            "num_layers": 4,
            "num_kv_heads": 1,
            "head_dim": 16,
            "query_scale": 11**-0.5,
            "vocab_size": 64,
        },
        2,
        32,
    ),
    "rope_scaled": (
        {
            "attn_pattern": "LLG",
            "num_layers": 7,
            "global_rope_scale": 8.0,
            "local_rope_base": 500.0,
            "global_rope_base": 20_000.0,
            "sliding_window": 7,
        },
        2,
        40,
    ),
    "gemma3": (  # the published pattern with a remainder, the 27B's odd query scale
        {
            "attn_pattern": "LLLLLG",
            "num_layers": 8,
            "num_heads": 2,
            "num_kv_heads": 1,
            "head_dim": 32,
            "query_scale": 21**-0.5,
            "global_rope_scale": 8.0,
            "sliding_window": 16,
            "vocab_size": 200,
        },
        2,
        56,
    ),
    "remainder_only": (  # fewer layers than letters; the window is longer than the text
        {"attn_pattern": "LLGLLLG", "num_layers": 5, "sliding_window": 64, "norm_eps": 1e-5},
        1,
        20,
    ),
    "softcaps": (  # low caps, so that they bend most numbers
        {
            "attn_pattern": "LG",
            "num_layers": 3,
            "attn_softcap": 1.5,
            "final_softcap": 2.0,
            "embed_dim": 24,
            "head_dim": 12,
            "query_scale": 4**-0.5,
        },
        2,
        24,
    ),
    "long": (  # several blocks of an attention that works in blocks
        {"attn_pattern": "LLG", "num_layers": 4, "sliding_window": 20, "vocab_size": 64},
        1,
        300,
    ),
    "untied_head": (
        {
            "attn_pattern": "GL",
            "num_layers": 4,
            "num_heads": 6,
            "num_kv_heads": 2,
            "embed_dim": 48,
            "tied_embedding": False,
            "local_rope_scale": 2.0,
        },
        2,
        32,
    ),
}

CASES = {
    name: {**_COMMON, **changes, "seed": seed, "batch": batch, "seq_len": seq_len}
    for seed, (name, (changes, batch, seq_len)) in enumerate(_CASES.items())
}


def model_fields(case: dict) -> dict:
    """The keyword arguments of ModelConfig."""
    return {k: v for k, v in case.items() if k not in ("seed", "batch", "seq_len")}


def layer_letters(case: dict) -> str:
    """One letter a layer: the pattern repeated and cut."""
    pattern, layers = case["attn_pattern"], case["num_layers"]
    return (pattern * layers)[:layers]
