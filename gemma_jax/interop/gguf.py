"""Gemma 3 as GGUF: the settings as llama.cpp's `gemma3` architecture knows them, and the tensors.

Norm weights are stored as 1 + w. That rounds w, so where an exact w would be lost it is kept beside
them under a key of our own, which other readers skip.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType

from gemma_jax.errors import UserError
from gemma_jax.interop.blocks import BLOCK, pack_q4_0, pack_q8_0
from gemma_jax.interop.gguf_file import GgufFile, TensorInfo, write_gguf
from gemma_jax.interop.names import Weight, check_layers, every_nth_global, pattern_of
from gemma_jax.model.config import GLOBAL, LOCAL, ModelConfig

ARCHITECTURE = "gemma3"
_EXACT_NORMS = "gemma_jax.norms"  # every norm's w in float32, in the order of the tensors
_TYPES = GGMLQuantizationType
# general.file_type of llama.h's llama_ftype, beside the type of the matrices.
_DTYPES = {
    "f32": (_TYPES.F32, 0),
    "f16": (_TYPES.F16, 1),
    "q4_0": (_TYPES.Q4_0, 2),
    "q8_0": (_TYPES.Q8_0, 7),
    "bf16": (_TYPES.BF16, 32),
}
DTYPES = tuple(_DTYPES)
_LAYERS_OF_27B = 62


def read_config(file: GgufFile) -> ModelConfig:
    """The model's settings by the metadata, with llama.cpp's defaults for what is left out."""
    fields, where = file.fields, file.where
    architecture = fields.get("general.architecture")
    if architecture != ARCHITECTURE:
        raise UserError(
            f"{where} holds the architecture {architecture!r}; only {ARCHITECTURE!r} can be "
            "imported."
        )
    try:
        return _config(file)
    except UserError:
        raise
    except (TypeError, ValueError, KeyError, ArithmeticError) as error:
        raise UserError(
            f"{where} does not describe a Gemma 3 model: {error!r}; fetch it again."
        ) from error


def _config(file: GgufFile) -> ModelConfig:
    def get(name: str, default: Any = None) -> Any:
        value = file.fields.get(f"{ARCHITECTURE}.{name}", default)
        if value is None:
            raise UserError(f"{file.where} lacks the key {ARCHITECTURE}.{name}; fetch it again.")
        return value

    layers, heads = int(get("block_count")), int(get("attention.head_count"))
    width, head_dim = int(get("embedding_length")), int(get("attention.key_length"))
    scaling = get("rope.scaling.type", "none")
    if scaling not in ("none", "linear"):
        raise UserError(f"{file.where} has RoPE scaling {scaling!r}; only linear can be imported.")
    embedding = file.shapes.get("token_embd.weight")
    if embedding is None:
        raise UserError(f"{file.where} has no tensor token_embd.weight; fetch it again.")
    check_layers(layers, file.where)
    softcap = float(get("final_logit_softcapping", 0.0))
    window = int(get("attention.sliding_window", 0))
    letters = _letters(get("attention.sliding_window_pattern", 6), layers, file)
    if not window:
        window, letters = int(get("context_length")), GLOBAL * layers
    return ModelConfig(
        vocab_size=embedding[0],
        embed_dim=width,
        mlp_dim=int(get("feed_forward_length")),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=int(get("attention.head_count_kv", heads)),
        head_dim=head_dim,
        max_seq_len=int(get("context_length")),
        attn_pattern=pattern_of(letters),
        sliding_window=window,
        local_rope_base=float(get("rope.freq_base_swa", 10_000.0)),
        global_rope_base=float(get("rope.freq_base", 10_000.0)),
        global_rope_scale=float(get("rope.scaling.factor", 1.0)) if scaling == "linear" else 1.0,
        query_scale=_query_scale(layers, width, heads, head_dim),
        final_softcap=softcap or None,
        tied_embedding="output.weight" not in file.tensors,
        norm_eps=_shortest(get("attention.layer_norm_rms_epsilon")),
    )


def _letters(pattern: Any, layers: int, file: GgufFile) -> str:
    """`pattern` is a list of "is local", or n: every n-th layer is global."""
    if isinstance(pattern, int):
        return every_nth_global(pattern, layers)
    if len(pattern) < layers:
        raise UserError(f"{file.where} has a pattern of {len(pattern)} layers for {layers}.")
    return "".join(LOCAL if local else GLOBAL for local in pattern[:layers])


def _query_scale(layers: int, width: int, heads: int, head_dim: int) -> float | None:
    """None for head_dim^-1/2. llama.cpp knows the 27B by its 62 layers and no other exception."""
    if layers == _LAYERS_OF_27B and width // heads != head_dim:
        return (width // heads) ** -0.5
    return None


def _shortest(value: float) -> float:
    """The decimal that was meant by a float32: 1e-06, not 9.999999974752427e-07."""
    return float(str(np.float32(value)))


class GgufTensors:
    """A file's tensors with norms as w, not 1 + w."""

    def __init__(self, file: GgufFile, weights: Sequence[Weight]) -> None:
        self.where, self._file = file.where, file
        self._norms: dict[str, np.ndarray | None] = {}
        exact, at = file.fields.get(_EXACT_NORMS), 0
        if not isinstance(exact, np.ndarray) or exact.dtype != np.float32:
            exact = None
        for weight in weights:
            if weight.kind == "norm":
                end = at + weight.shape[0]
                self._norms[weight.gguf] = None if exact is None else exact[at:end]
                at = end

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._file.shapes

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        values = self._file.read(name, start, stop)
        if name not in self._norms:
            return values
        exact = self._norms[name]
        if exact is not None and np.array_equal(exact + np.float32(1), values):
            return exact
        return values - np.float32(1)


def to_fields(config: ModelConfig, tokenizer: Mapping[str, Any], dtype: str, name: str) -> dict:
    """The metadata of a file; refuses what llama.cpp cannot be told."""
    _check(config, dtype)
    fields: dict[str, Any] = {
        "general.architecture": ARCHITECTURE,
        "general.type": "model",
        "general.name": name,
        "general.file_type": _DTYPES[dtype][1],
        "general.quantization_version": 2,
    }
    own: dict[str, Any] = {
        "context_length": config.max_seq_len,
        "embedding_length": config.embed_dim,
        "block_count": config.num_layers,
        "feed_forward_length": config.mlp_dim,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.norm_eps),
        "rope.freq_base": float(config.global_rope_base),
        "rope.freq_base_swa": float(config.local_rope_base),
    }
    if LOCAL in config.layer_letters:  # a window that no layer has ends llama.cpp
        own["attention.sliding_window"] = config.sliding_window
        own["attention.sliding_window_pattern"] = [x == LOCAL for x in config.layer_letters]
    if config.global_rope_scale != 1:
        own["rope.scaling.type"] = "linear"
        own["rope.scaling.factor"] = float(config.global_rope_scale)
    if config.final_softcap is not None:
        own["final_logit_softcapping"] = float(config.final_softcap)
    return fields | {f"{ARCHITECTURE}.{k}": v for k, v in own.items()} | dict(tokenizer)


def _check(config: ModelConfig, dtype: str) -> None:
    c = config
    known = _query_scale(c.num_layers, c.embed_dim, c.num_heads, c.head_dim)
    known = c.head_dim**-0.5 if known is None else known
    for problem, how in (
        (not c.qk_norm, "qk_norm=False"),
        (not c.post_norms, "post_norms=False"),
        (c.attn_softcap is not None, f"attn_softcap={c.attn_softcap}"),
        (
            LOCAL in c.layer_letters and c.local_rope_scale != 1,
            f"local_rope_scale={c.local_rope_scale}",
        ),
        (
            abs(c.q_scale - known) > 1e-9,
            f"query_scale={c.q_scale:.6g} where it computes {known:.6g}",
        ),
    ):
        if problem:
            raise UserError(f"llama.cpp's gemma3 cannot be told model.{how}; export as hf instead.")
    inputs = {"embed_dim": c.embed_dim, "mlp_dim": c.mlp_dim}
    inputs["num_heads x head_dim"] = c.num_heads * c.head_dim
    for name, size in inputs.items():
        if dtype in ("q4_0", "q8_0") and size % BLOCK:
            raise UserError(
                f"{name}={size} is no multiple of {BLOCK}, the block of {dtype}; choose f32, bf16 "
                "or f16."
            )


def write_model(
    path: Path,
    fields: Mapping[str, Any],
    weights: Sequence[Weight],
    read: Callable[[Weight], Iterator[np.ndarray]],
    dtype: str,
) -> None:
    """Writes a whole model; `read` yields a tensor's rows in their order, in float32."""
    norms = {w.gguf: np.concatenate(list(read(w))) for w in weights if w.kind == "norm"}
    exact = np.concatenate(list(norms.values())).astype(np.float32)
    if not np.array_equal((exact + np.float32(1)) - np.float32(1), exact):
        fields = {**fields, _EXACT_NORMS: exact}
    infos = [
        TensorInfo(w.gguf, w.foreign_shape, _TYPES.F32 if w.kind == "norm" else _DTYPES[dtype][0])
        for w in weights
    ]

    def content(weight: Weight) -> Iterator[memoryview]:
        if weight.kind == "norm":
            yield _bytes(norms[weight.gguf].astype("<f4") + np.float32(1))
            return
        for rows in read(weight):
            if (largest := float(np.abs(rows).max())) > _LARGEST.get(dtype, np.inf):
                raise UserError(
                    f"{weight.gguf} holds a value of magnitude {largest:.6g}, too large for "
                    f"{dtype}; choose f32 or bf16."
                )
            yield _bytes(_PACK[dtype](rows))

    write_gguf(path, fields, infos, ((weight.gguf, content(weight)) for weight in weights))


_PACK: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "f32": lambda rows: rows.astype("<f4"),
    "f16": lambda rows: rows.astype("<f2"),
    "bf16": lambda rows: rows.astype(ml_dtypes.bfloat16),
    "q8_0": pack_q8_0,
    "q4_0": pack_q4_0,
}


# Beyond these a float16, or the float16 scale of a block, overflows.
_LARGEST = {"f16": 65504.0, "q4_0": 65504.0 * 8, "q8_0": 65504.0 * 127}


def _bytes(values: np.ndarray) -> memoryview:
    return np.ascontiguousarray(values).view(np.uint8).reshape(-1).data


def modelfile(name: str) -> str:
    """Ollama's description of the model in the file `name`, with Gemma's chat format."""
    return f"""FROM ./{name}
TEMPLATE \"\"\"{{{{- range $i, $_ := .Messages }}}}
{{{{- $last := eq (len (slice $.Messages $i)) 1 }}}}
{{{{- if or (eq .Role "user") (eq .Role "system") }}}}<start_of_turn>user
{{{{ .Content }}}}<end_of_turn>
{{{{ if $last }}}}<start_of_turn>model
{{{{ end }}}}
{{{{- else if eq .Role "assistant" }}}}<start_of_turn>model
{{{{ .Content }}}}{{{{ if not $last }}}}<end_of_turn>
{{{{ end }}}}
{{{{- end }}}}
{{{{- end }}}}\"\"\"
PARAMETER stop "<end_of_turn>"
PARAMETER temperature 1.0
PARAMETER top_k 64
PARAMETER top_p 0.95
"""
