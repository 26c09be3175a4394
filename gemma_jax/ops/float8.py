"""Operands of a matmul rounded to eight bits: e4m3 (Micikevicius et al., arXiv 2209.05433).

A rounded operand is values times a scale, and the product of two is undone by a multiplication of
its result. The scales are powers of two, so that neither dividing by them nor multiplying with them
rounds anything: what is lost is lost to e4m3's three bits of mantissa alone. These are floating
too: a number keeps all of them down to 2^-13 of the largest that shares its scale, and what is
smaller still is off by 2^-17 of that at most. So a scale has no more to do than to keep the largest
from overflowing, and numbers of rather different sizes may share one.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

E4M3 = jnp.float8_e4m3fn
_TOP = 128.0  # the largest number of a scale comes to [128, 256); e4m3 ends at 448
_EXPONENT = 0x7F800000  # of a float32
_SMALLEST = 2.0**-100


class Scaled(NamedTuple):
    """`values` (e4m3) times `scale` (float32) is what was rounded."""

    values: Array
    scale: Array


def scaled_rows(x: Float[Array, "n D"]) -> Scaled:
    """With a scale a row [n], so that no row is rounded otherwise for those beside it."""
    scale = _scale(jnp.abs(x).max(axis=-1))
    return Scaled(_divided(x, scale[:, None]), scale)


def scaled_whole(x: Float[Array, "V D"], axis: str | None = None) -> Scaled:
    """With one scale []; that of all parts where `x` is split over the mesh axis `axis`."""
    largest = jnp.abs(x).max()
    if axis is not None:
        largest = jax.lax.pmax(largest, axis)
    scale = _scale(largest)
    return Scaled(_divided(x, scale), scale)


def _scale(largest: Array) -> Array:
    largest = jnp.maximum(largest.astype(jnp.float32), _SMALLEST)
    bits = jax.lax.bitcast_convert_type(largest, jnp.int32)
    return jax.lax.bitcast_convert_type(bits & _EXPONENT, jnp.float32) / _TOP


def _divided(x: Array, scale: Array) -> Array:
    return (x.astype(jnp.float32) / scale).astype(E4M3)
