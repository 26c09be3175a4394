"""The softmax of a chunk of the vocabulary head, with all that its loss and gradient need of it.

Where the vocabulary is split over devices, each holds the columns of its own ids; maximum, sum of
exponentials and target logits are joined over the mesh axis `axis`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_FAR = 60.0  # nats
_NEAR = 1e-4  # nats; sums of the same products in another order differ by less


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


def by_logits(
    softcap: float | None,
    axis: str | None,
    table: Array,
    hidden: Array,
    places: Array,
    here: Array,
) -> Softmax:
    """By way of the logits."""
    z = jnp.einsum("nD,VD->nV", hidden, table, preferred_element_type=jnp.float32)
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
    return Softmax(p.astype(hidden.dtype), total, top, stats)


def by_kernel(axis: str | None, table: Array, hidden: Array, places: Array, here: Array) -> Softmax:
    """By a kernel that never writes the logits, and must be told a shift before it has seen them.

    The target's logit is a good one: a token's loss would have to be over `_FAR` nats for the
    exponentials to grow too large, and then they are made once more, with the maximum itself.
    """
    from gemma_jax.ops.vocab_kernel import exp_logits

    rows = table.at[places].get(mode="clip")
    targets = jnp.einsum("nMD,nD->nM", rows, hidden, preferred_element_type=jnp.float32)
    if axis is not None:
        targets = jax.lax.psum(jnp.where(here, targets, 0), axis)
    shift = targets.max(axis=-1)
    p, total, top = exp_logits(hidden, table, shift)
    if axis is not None:
        top = jax.lax.pmax(top, axis)

    def again(_: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        return *exp_logits(hidden, table, top)[:2], top

    p, total, shift = jax.lax.while_loop(
        lambda state: (top - state[2] > _FAR).any(), again, (p, total, shift)
    )
    if axis is not None:
        total = jax.lax.psum(total, axis)
    # The maximum is the kernel's own sum, the target's logit another: where they are the same one.
    best = targets.max(axis=-1)
    top = jnp.where(top - best < _NEAR, best, top)
    return Softmax(p, total, shift, VocabStats(shift + jnp.log(total), top, targets))
