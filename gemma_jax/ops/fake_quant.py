"""Rounding of weights to what four or eight bits can hold, with a straight-through gradient.

Quantisation-aware training (Jacob et al., arXiv 1712.05877; Gemma 3 report, arXiv 2503.19786,
section 2.3) computes with the rounded weights and hands their gradient to the full ones unchanged
(Bengio et al., arXiv 1308.3432). `q4_0` gives bit for bit the weights of a GGUF in that format, so
what was trained is what is deployed.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

type Scheme = Literal["q4_0", "int4", "sfp8"]

BLOCK = 32  # weights that share a scale in Q4_0
_SFP8_MAX = 1.875
# Of 1.111 and more times 2^-8, 1.1111 is the first that the finer half of SFP8 rounds to 2^-7.
_SFP8_FINE_FROM = 0.007568359375
_SFP8_MIN = 1.25 * 2.0**-23  # the code of 2^-23 itself stands for zero


def fake_quantize(w: Float[Array, "*n"], scheme: Scheme, inputs: Sequence[int]) -> Array:
    """`w` rounded to `scheme`; the gradient is that of `w` itself.

    `inputs` are the contracted dimensions, in their order: one output's weights along them share
    scales.

    q4_0: blocks of 32 along the flattened `inputs`, one float16 scale each (ggml
      `quantize_row_q4_0_ref`); their number must be a multiple of 32.
    int4: whole numbers from -7 to 7 with one float32 scale an output.
    sfp8: gemma.cpp's switched floating point, three bits of mantissa from 2^-7 up and two below,
      with one scale for the whole of `w` where something in it is over 1.875.
    """
    if scheme == "q4_0" and math.prod(w.shape[i] for i in inputs) % BLOCK:
        raise ValueError(f"Q4_0 needs a multiple of {BLOCK} inputs; {w.shape} has other ones")
    return _straight_through(scheme, tuple(inputs), w)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _straight_through(scheme: Scheme, inputs: tuple[int, ...], w: Array) -> Array:
    round_: Callable[[Array], Array] = {"q4_0": _q4_0, "int4": _int4, "sfp8": _sfp8}[scheme]
    outputs = [i for i in range(w.ndim) if i not in inputs]
    order = [*outputs, *inputs]
    moved = w.astype(jnp.float32).transpose(order)
    rows = moved.reshape(*moved.shape[: len(outputs)], -1)
    back = [order.index(i) for i in range(w.ndim)]
    return round_(rows).reshape(moved.shape).transpose(back).astype(w.dtype)


def _forward(scheme: Scheme, inputs: tuple[int, ...], w: Array) -> tuple[Array, None]:
    return _straight_through(scheme, inputs, w), None


def _backward(scheme: Scheme, inputs: tuple[int, ...], _: None, g: Array) -> tuple[Array]:
    return (g,)


_straight_through.defvjp(_forward, _backward)


def _q4_0(rows: Float[Array, "*n k"]) -> Float[Array, "*n k"]:
    """d = m / -8, m of largest magnitude, the first of equals; q = min(15, trunc(x / d + 8.5))."""
    blocks = rows.reshape(*rows.shape[:-1], -1, BLOCK)
    first = jnp.abs(blocks).argmax(axis=-1, keepdims=True)
    d = jnp.take_along_axis(blocks, first, axis=-1) / jnp.float32(-8)
    # Where 1 / d would overflow, ggml's scale is zero in float16 as well.
    inverse = jnp.where(jnp.abs(d) > 2.0**-127, 1 / jnp.where(d == 0, 1, d), 0)
    scaled = blocks * inverse
    # ggml rounds the product before it adds; a compiler may fuse both into one rounding unless
    # something stands between them.
    scaled = jnp.where(jnp.isnan(scaled), 0, scaled)
    q = jnp.minimum(jnp.trunc(scaled + jnp.float32(8.5)), 15)
    return ((q - 8) * d.astype(jnp.float16).astype(jnp.float32)).reshape(rows.shape)


def _int4(rows: Float[Array, "*n k"]) -> Float[Array, "*n k"]:
    scale = jnp.abs(rows).max(axis=-1, keepdims=True) / 7
    return jnp.round(rows / jnp.where(scale == 0, 1, scale)) * scale


def _sfp8(rows: Float[Array, "*n k"]) -> Float[Array, "*n k"]:
    scale = jnp.maximum(jnp.abs(rows).max() / _SFP8_MAX, 1)
    x = rows / scale
    size = jnp.abs(x)
    fine, coarse = (jax.lax.reduce_precision(size, 8, bits) for bits in (3, 2))
    coarse = jnp.where(coarse < 2.0**-23, 0, jnp.maximum(coarse, _SFP8_MIN))
    rounded = jnp.where(size >= _SFP8_FINE_FROM, fine, coarse)
    return jnp.sign(x) * rounded * scale
