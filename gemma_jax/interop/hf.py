"""The config.json of Hugging Face folders, as `Gemma3ForCausalLM` of transformers 5.

Reads text-only models and the text half of multimodal ones, the older spelling of the settings
(`rope_theta`, `rope_local_base_freq`, `rope_scaling`, `sliding_window_pattern`) and the newer one
(`rope_parameters`, `layer_types`). Values that a config leaves out are those of transformers'
`Gemma3TextConfig`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemma_jax.data.tokenizer import BOS, END_OF_TURN, EOS, PAD
from gemma_jax.errors import UserError
from gemma_jax.files import read_json
from gemma_jax.interop.names import check_layers, every_nth_global, pattern_of
from gemma_jax.model.config import GLOBAL, LOCAL, ModelConfig

CONFIG, GENERATION = "config.json", "generation_config.json"
_TEXT = "Gemma3ForCausalLM"
_MULTIMODAL = "Gemma3ForConditionalGeneration"
_LOCAL, _GLOBAL = "sliding_attention", "full_attention"


def read_config(folder: Path) -> tuple[ModelConfig, bool]:
    """The model's settings by config.json, and whether it is half of a multimodal one."""
    path = folder / CONFIG
    values = read_json(path, "the settings of a Hugging Face model")
    if not isinstance(values, dict):
        raise UserError(f"{path} is not the settings of a model; fetch it again.")
    names = values.get("architectures")
    architecture = names[0] if isinstance(names, list) and names else names
    if architecture not in (_TEXT, _MULTIMODAL):
        raise UserError(
            f"{path} describes the architecture {architecture}; only {_TEXT} and {_MULTIMODAL} "
            "can be imported."
        )
    if architecture == _MULTIMODAL:
        values = values.get("text_config") or {}
    try:
        return _config(values, path), architecture == _MULTIMODAL
    except UserError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
        raise UserError(
            f"{path} does not describe a Gemma 3 model: {error!r}; fetch it again."
        ) from error


def _config(values: Mapping[str, Any], path: Path) -> ModelConfig:
    def get(name: str, default: Any) -> Any:
        value = values.get(name)
        return default if value is None else value

    for name, fixed in (
        ("hidden_activation", "gelu_pytorch_tanh"),
        ("attention_bias", False),
        ("use_bidirectional_attention", False),
    ):
        if get(name, fixed) != fixed:
            raise UserError(f"{path} has {name}={values[name]!r}; only {fixed!r} can be imported.")
    layers = int(get("num_hidden_layers", 26))
    check_layers(layers, str(path))
    ropes = _ropes(values, path)
    head_dim, scalar = int(get("head_dim", 256)), float(get("query_pre_attn_scalar", 256))
    return ModelConfig(
        vocab_size=int(get("vocab_size", 262_208)),
        embed_dim=int(get("hidden_size", 2304)),
        mlp_dim=int(get("intermediate_size", 9216)),
        num_layers=layers,
        num_heads=int(get("num_attention_heads", 8)),
        num_kv_heads=int(get("num_key_value_heads", 4)),
        head_dim=head_dim,
        max_seq_len=int(get("max_position_embeddings", 131_072)),
        attn_pattern=pattern_of(_letters(values, layers, path)),
        sliding_window=int(get("sliding_window", 4096)),
        local_rope_base=ropes[_LOCAL][0],
        local_rope_scale=ropes[_LOCAL][1],
        global_rope_base=ropes[_GLOBAL][0],
        global_rope_scale=ropes[_GLOBAL][1],
        query_scale=None if scalar == head_dim else scalar**-0.5,
        attn_softcap=values.get("attn_logit_softcapping"),
        final_softcap=values.get("final_logit_softcapping"),
        tied_embedding=bool(get("tie_word_embeddings", True)),
        norm_eps=float(get("rms_norm_eps", 1e-6)),
    )


def _letters(values: Mapping[str, Any], layers: int, path: Path) -> str:
    types = values.get("layer_types")
    if types is None:
        every = int(values.get("sliding_window_pattern") or 6)
        return every_nth_global(every, layers)
    known = {_LOCAL: LOCAL, _GLOBAL: GLOBAL}
    if len(types) != layers or set(types) - known.keys():
        raise UserError(
            f"{path} has {len(types)} layer_types of the kinds {sorted(set(types))} for {layers} "
            f"layers; each layer must be one of {sorted(known)}."
        )
    return "".join(known[kind] for kind in types)


def _ropes(values: Mapping[str, Any], path: Path) -> dict[str, tuple[float, float]]:
    """(base, scale) by the type of layer."""
    parameters = values.get("rope_parameters")
    if parameters is None:
        base, local = values.get("rope_theta"), values.get("rope_local_base_freq")
        parameters = {
            _GLOBAL: {"rope_theta": base or 1e6, **(values.get("rope_scaling") or {})},
            _LOCAL: {"rope_theta": local or 1e4},
        }
    defaults = {_GLOBAL: 1e6, _LOCAL: 1e4}
    ropes = {}
    for kind, base in defaults.items():
        rope = parameters.get(kind) or {}
        how = rope.get("rope_type", rope.get("type", "default"))
        if how not in ("default", "linear"):
            raise UserError(
                f"{path} has RoPE scaling of the type {how!r}; only 'linear' can be imported."
            )
        scale = float(rope.get("factor") or 1.0) if how == "linear" else 1.0
        ropes[kind] = float(rope.get("rope_theta") or base), scale
    return ropes


def to_config(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """config.json of a model; refuses what Gemma3ForCausalLM cannot be."""
    _check(config)

    def rope(letter: str) -> dict[str, Any]:
        base, scale = config.rope(letter)
        if scale == 1:
            return {"rope_type": "default", "rope_theta": base}
        return {"rope_type": "linear", "rope_theta": base, "factor": scale}

    types = {LOCAL: _LOCAL, GLOBAL: _GLOBAL}
    local, whole = rope(LOCAL), rope(GLOBAL)
    names = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}
    return {
        "architectures": [_TEXT],
        "model_type": "gemma3_text",
        "dtype": names[dtype],
        "torch_dtype": names[dtype],  # before transformers 4.56
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_seq_len,
        "layer_types": [types[letter] for letter in config.layer_letters],
        "sliding_window_pattern": config.layer_letters.find(GLOBAL) + 1 or config.num_layers + 1,
        "sliding_window": config.sliding_window,
        "rope_parameters": {_LOCAL: local, _GLOBAL: whole},
        # The same again for readers of the older spelling (mlx-lm, transformers 4).
        "rope_theta": whole["rope_theta"],
        "rope_local_base_freq": local["rope_theta"],
        "rope_scaling": (
            {"rope_type": "linear", "factor": whole["factor"]} if "factor" in whole else None
        ),
        "query_pre_attn_scalar": round(config.q_scale**-2),
        "attn_logit_softcapping": config.attn_softcap,
        "final_logit_softcapping": config.final_softcap,
        "tie_word_embeddings": config.tied_embedding,
        "rms_norm_eps": config.norm_eps,
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "use_bidirectional_attention": False,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        "bos_token_id": BOS,
    }


def _check(config: ModelConfig) -> None:
    c, scalar = config, config.q_scale**-2
    for problem, how in (
        (not c.qk_norm, "qk_norm=False"),
        (not c.post_norms, "post_norms=False"),
        # The setting exists, and its layers leave it out.
        (c.attn_softcap is not None, f"attn_softcap={c.attn_softcap}"),
        (
            c.embed_dim % c.num_heads != 0,
            f"embed_dim={c.embed_dim} that is no multiple of num_heads={c.num_heads}",
        ),
        (
            abs(scalar - round(scalar)) > 1e-6 * scalar,
            f"query_scale={c.q_scale:.6g} that is no integer to the power -1/2",
        ),
    ):
        if problem:
            raise UserError(f"transformers' {_TEXT} cannot be told model.{how}.")


def generation_config(vocab_size: int) -> dict[str, Any]:
    """Gemma's sampling, and the ids that end a text."""
    stops = [EOS, END_OF_TURN] if vocab_size > END_OF_TURN else [EOS]
    return {
        "bos_token_id": BOS,
        "eos_token_id": stops,
        "pad_token_id": PAD,
        "do_sample": True,
        "top_k": 64,
        "top_p": 0.95,
        "temperature": 1.0,
    }
