"""Quantisation-aware training: the model computes with rounded weights, the full ones are trained.

Gemma 3 report (arXiv 2503.19786), section 2.3: some thousand steps from a finished checkpoint, with
that checkpoint's own probabilities as targets. `quantized` is a function on the parameter tree, so
any objective and any stream of batches go with it, and what is validated is the rounded model.
"""

import dataclasses
import functools
import math
from typing import Any

import jax

from gemma_jax.errors import UserError
from gemma_jax.ops.fake_quant import BLOCK, Scheme, fake_quantize
from gemma_jax.settings import check_types
from gemma_jax.tuning.lora import TABLES, inputs_of, is_norm, is_stacked, leaves_of_axes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qat:
    """What weights are rounded to (`ops.fake_quant`); norms never are.

    "q4_0" is what `export --format gguf --dtype q4_0` writes, bit for bit. "int4" has a scale an
    output channel, "sfp8" is eight bits of switched floating point. With `embedding=False` the
    tables stay as they are.
    """

    scheme: Scheme = "q4_0"
    embedding: bool = True

    def __post_init__(self) -> None:
        check_types(self)


def quantized(settings: Qat, axes: Any, params: Any) -> Any:
    """The parameters with every matrix rounded; `axes` are their logical axes.

    A matrix is rounded along the dimensions that it sums over, a table [V, D] along D, for which
    it is a matrix when it scores tokens.
    """
    inputs = {path: _inputs(settings, path, own) for path, own in leaves_of_axes(axes)}

    def place(keys: tuple, weight: jax.Array) -> jax.Array:
        path = tuple(key.key for key in keys)
        chosen = inputs[path]
        if chosen is None:
            return weight
        one = lambda w: fake_quantize(w, settings.scheme, chosen)  # noqa: E731
        return jax.vmap(one)(weight) if is_stacked(path) else one(weight)

    return jax.tree.map_with_path(place, params)


def rounded(settings: Qat, axes: Any, params: Any) -> Any:
    """The parameters of a finished model rounded once and for all; those given are used up.

    Raises:
      UserError: where rows give no whole blocks.
    """
    check_widths(settings, axes, params)
    place = functools.partial(quantized, settings, axes)
    shardings = jax.tree.map(lambda x: x.sharding, params)
    return jax.jit(place, donate_argnums=0, out_shardings=shardings)(params)


def check_widths(settings: Qat, axes: Any, shapes: Any) -> None:
    """Refuses a model whose rows give no whole blocks."""
    if settings.scheme != "q4_0":
        return
    sizes = {
        tuple(key.key for key in keys): x.shape for keys, x in jax.tree.leaves_with_path(shapes)
    }
    for path, own in leaves_of_axes(axes):
        chosen = _inputs(settings, path, own)
        if chosen is None:
            continue
        shape = sizes[path][1:] if is_stacked(path) else sizes[path]
        if (width := math.prod(shape[i] for i in chosen)) % BLOCK:
            raise UserError(
                f"{'/'.join(path)} sums over {width} inputs, no multiple of {BLOCK}, the block of "
                "q4_0; choose quantization.scheme='int4', or other widths."
            )


def _inputs(settings: Qat, path: tuple[str, ...], axes: tuple) -> tuple[int, ...] | None:
    """The dimensions of one layer's matrix that it sums over; None where nothing is rounded."""
    if is_norm(path):
        return None
    if path[0] in TABLES:
        return (1,) if settings.embedding else None
    return tuple(range(inputs_of(path, axes)))
