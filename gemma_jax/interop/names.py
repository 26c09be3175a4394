"""One table of tensor names and layouts, for both foreign formats and both directions.

A layer is a slice of a stacked array here and a tensor of its own there. Their matrices are
[out, in], ours are [in..., out...] with heads as dimensions of their own; an embedding is [V, D]
everywhere. Nothing is permuted beyond that: Gemma's half-split RoPE is the same in all three.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from gemma_jax.errors import UserError
from gemma_jax.model.config import GLOBAL, LOCAL, ModelConfig

_MAX_LAYERS = 512  # llama.cpp's limit
_PIECE_BYTES = 64 << 20  # of an embedding in float32 at once

Kind = Literal["embedding", "matrix", "norm"]


@dataclass(frozen=True)
class Weight:
    """One tensor of a foreign file, and where it lives in the parameter tree.

    `layer` is the index on the leading axis of a stacked parameter, None for one that is not
    stacked. `shape` is ours, without that axis; the first `inputs` dimensions are contracted.
    """

    path: tuple[str, ...]
    layer: int | None
    shape: tuple[int, ...]
    inputs: int
    kind: Kind
    hf: str
    gguf: str

    @property
    def foreign_shape(self) -> tuple[int, ...]:
        if self.kind != "matrix":
            return self.shape
        return math.prod(self.shape[self.inputs :]), math.prod(self.shape[: self.inputs])

    def cuts(self, rows: int) -> Iterator[tuple[int, int]]:
        """Where to cut the rows of either layout so that memory holds little: an embedding into
        pieces, all else not at all."""
        step = rows
        if self.kind == "embedding":
            step = max(1, _PIECE_BYTES // (4 * self.shape[1]))
        for start in range(0, rows, step):
            yield start, min(start + step, rows)

    def to_foreign(self, value: np.ndarray) -> np.ndarray:
        if self.kind != "matrix":
            return value
        return value.reshape(self.foreign_shape[::-1]).T

    def from_foreign(self, value: np.ndarray) -> np.ndarray:
        return value if self.kind != "matrix" else value.T.reshape(self.shape)


def weight_table(config: ModelConfig) -> list[Weight]:
    """Every tensor of a model, in reading order."""
    c = config
    embedding = (c.vocab_size, c.embed_dim)
    table = [
        Weight(
            ("embedder", "embedding"),
            None,
            embedding,
            0,
            "embedding",
            "model.embed_tokens.weight",
            "token_embd.weight",
        )
    ]
    for number, (place, layer) in enumerate(_layers(c)):
        for path, shape, inputs, hf, gguf in _block(c):
            kind: Kind = "norm" if path[-1] == "scale" else "matrix"
            hf_name = f"model.layers.{number}.{hf}.weight"
            gguf_name = f"blk.{number}.{gguf}.weight"
            table.append(Weight((*place, *path), layer, shape, inputs, kind, hf_name, gguf_name))
    final = ("final_norm", "scale")
    table.append(
        Weight(final, None, (c.embed_dim,), 0, "norm", "model.norm.weight", "output_norm.weight")
    )
    if not c.tied_embedding:
        head = ("head", "embedding")
        table.append(
            Weight(head, None, embedding, 0, "embedding", "lm_head.weight", "output.weight")
        )
    return table


def check_layers(layers: int, where: str) -> None:
    """Refuses a number that no model has, before anything is made a layer."""
    if not 0 < layers <= _MAX_LAYERS:
        raise UserError(
            f"{where} has {layers} layers, which must be 1 to {_MAX_LAYERS}; fetch it again."
        )


def pattern_of(letters: str) -> str:
    """The shortest `attn_pattern` that gives these letters, one a layer."""
    for length in range(1, len(letters) + 1):
        if (letters[:length] * (len(letters) // length + 1)).startswith(letters):
            return letters[:length]
    return letters


def every_nth_global(n: int, layers: int) -> str:
    """The letters of layers of which each n-th is global."""
    return "".join(LOCAL if (i + 1) % n else GLOBAL for i in range(layers))


def _layers(config: ModelConfig) -> Iterator[tuple[tuple[str, ...], int | None]]:
    """Where each layer's block lives, from the first layer to the last."""
    for period in range(config.num_periods):
        for i in range(len(config.attn_pattern)):
            yield ("periods", f"block_{i}"), period
    for i in range(len(config.remainder)):
        yield (f"remainder_{i}",), None


def _block(config: ModelConfig) -> Iterator[tuple[tuple[str, ...], tuple[int, ...], int, str, str]]:
    """(path, shape, contracted dimensions, Hugging Face's name, GGUF's name) within a block."""
    D, F = config.embed_dim, config.mlp_dim
    N, K, H = config.num_heads, config.num_kv_heads, config.head_dim
    yield ("pre_attention_norm", "scale"), (D,), 0, "input_layernorm", "attn_norm"
    yield ("attention", "query"), (D, N, H), 1, "self_attn.q_proj", "attn_q"
    yield ("attention", "key"), (D, K, H), 1, "self_attn.k_proj", "attn_k"
    yield ("attention", "value"), (D, K, H), 1, "self_attn.v_proj", "attn_v"
    yield ("attention", "output"), (N, H, D), 2, "self_attn.o_proj", "attn_output"
    if config.qk_norm:
        yield ("attention", "query_norm", "scale"), (H,), 0, "self_attn.q_norm", "attn_q_norm"
        yield ("attention", "key_norm", "scale"), (H,), 0, "self_attn.k_norm", "attn_k_norm"
    if config.post_norms:
        name = "post_attention_layernorm"
        yield ("post_attention_norm", "scale"), (D,), 0, name, "post_attention_norm"
    yield ("pre_mlp_norm", "scale"), (D,), 0, "pre_feedforward_layernorm", "ffn_norm"
    yield ("mlp", "gate"), (D, F), 1, "mlp.gate_proj", "ffn_gate"
    yield ("mlp", "up"), (D, F), 1, "mlp.up_proj", "ffn_up"
    yield ("mlp", "down"), (F, D), 1, "mlp.down_proj", "ffn_down"
    if config.post_norms:
        name = "post_feedforward_layernorm"
        yield ("post_mlp_norm", "scale"), (D,), 0, name, "post_ffw_norm"
