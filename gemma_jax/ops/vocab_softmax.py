"""The softmax of a chunk of the vocabulary head, with all that its loss and gradient need of it.

Where the vocabulary is split over devices, each holds the columns of its own ids; maximum, sum of
exponentials and target logits are joined over the mesh axis `axis`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gemma_jax.ops.float8 import Scaled, scaled_rows

_FAR = 60.0  # nats
_NEAR = 1e-4  # nats; sums of the same products in another order differ by less
_NEAR_FLOAT8 = 2.0**-8  # nats; twice the rounding of an exponential to bfloat16
_SEEN = 1e-30  # an exponential


class VocabStats(NamedTuple):
    """What the head knows of each token; no gradient flows through it.

    `target_logits >= max_logit[..., None]` says whether a target is the likeliest token (a tie
    counts as yes); `target_logits - lse[..., None]` is its log-probability.
    """

    lse: Float[Array, "*n"]
    max_logit: Float[Array, "*n"]
    target_logits: Float[Array, "*n M"]


class Softmax(NamedTuple):
    """A softmax that is not divided by its sum: p = exp(z - shift), this device's columns of it,
    times the slope of a softcap, in the dtype of the matmuls; `sum` is over all columns."""

    p: Float[Array, "n V"]
    sum: Float[Array, " n"]
    shift: Float[Array, " n"]
    stats: VocabStats


class Factors(NamedTuple):
    """What the logits are the product of: z = scale[:, None] * (hidden @ table.T); a `scale` that
    is None is 1."""

    hidden: Float[Array, "n D"]
    table: Float[Array, "V D"]
    scale: Float[Array, " n"] | None


def float8_factors(hidden: Float[Array, "n D"], table: Scaled) -> Factors:
    """A scale a token; the table's single one goes into them, so that there is one vector to
    multiply by."""
    rows = scaled_rows(hidden)
    return Factors(rows.values, table.values, rows.scale * table.scale)


def by_logits(
    softcap: float | None,
    axis: str | None,
    factors: Factors,
    dtype: jnp.dtype,
    places: Array,
    here: Array,
) -> Softmax:
    """By way of the logits; `dtype` is that of the exponentials."""
    hidden, table, scale = factors
    z = jnp.einsum("nD,VD->nV", hidden, table, preferred_element_type=jnp.float32)
    if scale is not None:
        z = z * scale[:, None]
    if softcap is not None:
        z = softcap * jnp.tanh(z / softcap)
    top = z.max(axis=-1)
    if axis is not None:
        top = jax.lax.pmax(top, axis)
    p = jnp.exp(z - top[:, None])
    total = p.sum(axis=-1)
    targets = jnp.take_along_axis(z, places, axis=-1, mode="clip")
    if axis is not None:
        targets = jnp.where(here, targets, 0)
        joined = jax.lax.psum(jnp.concatenate([total[:, None], targets], axis=-1), axis)
        total, targets = joined[:, 0], joined[:, 1:]
    if softcap is not None:
        p = p * (1 - jnp.square(z / softcap))
    stats = VocabStats(top + jnp.log(total), top, targets)
    return Softmax(p.astype(dtype), total, top, stats)


def by_kernel(axis: str | None, factors: Factors, places: Array, here: Array) -> Softmax:
    """By a kernel that never writes the logits, and must be told a shift before it has seen them.

    The target's logit is a good one: a token's loss would have to be over `_FAR` nats for the
    exponentials to grow too large, and then they are made once more, with the maximum itself. The
    host is not asked whether: it would wait for the device in every chunk.
    """
    from gemma_jax.ops.vocab_kernel import exp_logits

    targets = _target_logits(factors, places)
    if axis is not None:
        targets = jax.lax.psum(jnp.where(here, targets, 0), axis)
    shift = targets.max(axis=-1)
    p, total, top = exp_logits(*factors, shift)
    if axis is not None:
        top = jax.lax.pmax(top, axis)

    far = (top - shift > _FAR).any()
    p, total_of_top, _ = exp_logits(*factors, top, instead=(far, p))
    shift, total = jnp.where(far, top, shift), jnp.where(far, total_of_top, total)
    if axis is not None:
        total = jax.lax.psum(total, axis)
    near = _NEAR
    if factors.scale is not None:
        near, targets = _NEAR_FLOAT8, _read_back(axis, p, shift, targets, places, here)
    # The maximum is the kernel's own sum, the target's logit another: where they are the same one.
    best = targets.max(axis=-1)
    top = jnp.where(top - best < near, best, top)
    return Softmax(p, total, shift, VocabStats(shift + jnp.log(total), top, targets))


def _target_logits(factors: Factors, places: Array) -> Float[Array, "n M"]:
    hidden, table, scale = factors
    rows = table.at[places].get(mode="clip")
    if scale is None:
        return jnp.einsum("nMD,nD->nM", rows, hidden, preferred_element_type=jnp.float32)
    # bfloat16 holds all that e4m3 can say, and is what any hardware multiplies row by row.
    rows, hidden = rows.astype(jnp.bfloat16), hidden.astype(jnp.bfloat16)
    z = jnp.einsum("nMD,nD->nM", rows, hidden, preferred_element_type=jnp.float32)
    return z * scale[:, None]


def _read_back(
    axis: str | None, p: Array, shift: Array, targets: Array, places: Array, here: Array
) -> Float[Array, "n M"]:
    """Target logits from their exponentials.

    Hopper's tensor cores sum products of eight-bit numbers to some 14 bits (DeepSeek-V3, arXiv
    2412.19437, section 3.3.2). What this does to all logits of a token alike has no effect on its
    loss as long as the target's logit has it too, so that comes from the same sum. `targets` stay
    where an exponential is too small.
    """
    own = p.at[jnp.arange(p.shape[0])[:, None], places].get(mode="clip").astype(jnp.float32)
    own = jnp.where(here, own, 0)
    if axis is not None:
        own = jax.lax.psum(own, axis)
    seen = own > _SEEN
    return jnp.where(seen, shift[:, None] + jnp.log(jnp.where(seen, own, 1)), targets)
