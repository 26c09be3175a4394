"""Drawing sparse targets from a teacher's distribution: N ids a token, with replacement.

A token's target is `count / N` over the drawn ids. Its expectation is the teacher's distribution,
so the gradient of the cross-entropy against it is an unbiased estimate of full distillation
(random-sampling KD, arXiv 2503.16870). Two ways to draw, with the same storage:

  systematic   `c_i = floor(N F_i + u) - floor(N F_{i-1} + u)`, F the cumulative distribution and
               one u ~ U[0, 1) a token: every id gets floor or ceil of N p_i, up to one on each
               side. The squared error of the estimate is several times below multinomial's.
  multinomial  N independent draws.

Both are N sorted thresholds in [0, 1) sent through the inverse of F: (k + u) / N with the code's
u = 1 - u above, and N sorted uniforms. F over 262 144 ids is never formed. The masses are summed in
a tree of fan-out 32; a threshold walks down from the root, at each node into the child that holds
it. That saves passes over the logits, and its rounding errors are those of pairwise summation.

The draws of a token depend on its key and its logits alone, not on the batch around it. (Sums of
another shape may be compiled to another order of additions: one draw in some millions can move.)
"""

from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

Method = Literal["systematic", "multinomial"]
METHODS: tuple[str, ...] = get_args(Method)

_FAN_OUT = 32  # one cache line of floats
# A leaf with no more mass than this is never drawn. A node's bound is 2 * fan-out times that of its
# children: a sum above it proves that one child lies above its own, whatever the rounding.
_NO_MASS = 1e-34


class SampledTargets(NamedTuple):
    """Sparse targets of n tokens, and what stays measurable about the teacher.

    `ids` int32 [n, N], ascending; `counts` int32 [n, N], adding up to N in each row: an id has its
    count at its first place in the row and 0 at the others. `label_logprob`, `entropy` float32 [n]
    in nats.
    """

    ids: jax.Array
    counts: jax.Array
    label_logprob: jax.Array
    entropy: jax.Array


def token_keys(base: jax.Array, record_index: jax.Array, num_positions: int) -> jax.Array:
    """Keys [B, T], one a token: a function of the seed, the record and the place alone.

    `base` is `jax.random.key(seed)`; `record_index` int [B].
    """
    places = jnp.arange(num_positions)
    fold = jax.random.fold_in
    return jax.vmap(lambda r: jax.vmap(lambda t: fold(fold(base, r), t))(places))(record_index)


def sample_targets(
    logits: jax.Array, labels: jax.Array, keys: jax.Array, *, draws: int, method: Method
) -> SampledTargets:
    """Draws `draws` ids a token from softmax(logits), with replacement.

    `logits` float32 [n, V] (-inf is allowed: such an id is never drawn), `labels` int [n], `keys`
    [n] as of `token_keys`. Holds a few [n, V] arrays: the caller bounds n. NaN logits give NaN
    statistics and meaningless draws.
    """
    leaves = _blocks(logits.astype(jnp.float32), -jnp.inf)
    top = jnp.max(leaves, axis=(1, 2))
    levels, total = _sum_tree(leaves, top)
    log_total = jnp.log(total)
    # With p = mass / total: entropy = log total - sum p (z - top). The barrier keeps the compiler
    # from sharing terms of size [n, V] with the sums above, which would write them to memory. The
    # bound makes 0 * -inf a 0.
    shifted = leaves - jax.lax.optimization_barrier(top)[:, None, None]
    drift = jnp.sum(jnp.exp(shifted) * jnp.maximum(shifted, -100.0), axis=(1, 2))
    label = jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0].astype(jnp.float32)

    thresholds = jax.vmap(lambda key: _thresholds(key, draws, method))(keys)
    ids = jnp.sort(_walk_down(levels, leaves, top, thresholds * total[:, None]), axis=-1)
    return SampledTargets(
        ids=ids,
        counts=_run_lengths(ids),
        label_logprob=label - top - log_total,
        entropy=log_total - drift / total,
    )


def _thresholds(key: jax.Array, draws: int, method: Method) -> jax.Array:
    """N places in [0, 1) at which the inverse cumulative distribution is read, ascending.

    Uniforms are multiples of 2^-23: an id of less than 1e-7 probability comes in steps of that.
    """
    if method == "multinomial":
        return jnp.sort(jax.random.uniform(key, (draws,)))
    u = jax.random.uniform(key, ())
    return (jnp.arange(draws, dtype=jnp.float32) + u) / draws


def _blocks(values: jax.Array, fill: float) -> jax.Array:
    """[n, size] -> [n, blocks, width]."""
    n, size = values.shape
    width = min(_FAN_OUT, size)
    return jnp.pad(values, ((0, 0), (0, -size % width)), constant_values=fill).reshape(n, -1, width)


def _sum_tree(leaves: jax.Array, top: jax.Array) -> tuple[list[jax.Array], jax.Array]:
    """Sums of masses above the leaves: levels [n, blocks, width] from below, and the total [n].

    The most probable id has mass 1, so the total lies between 1 and V.
    """
    sums = jnp.sum(jnp.exp(leaves - top[:, None, None]), axis=-1)
    levels = []
    while sums.shape[-1] > 1:
        levels.append(_blocks(sums, 0.0))
        sums = jnp.sum(levels[-1], axis=-1)
    return levels, sums[:, 0]


def _walk_down(
    levels: list[jax.Array], leaves: jax.Array, top: jax.Array, thresholds: jax.Array
) -> jax.Array:
    """The id [n, N] whose stretch of the cumulative mass holds each threshold."""
    block = jnp.zeros(thresholds.shape, jnp.int32)
    rest = thresholds
    for height in range(len(levels), -1, -1):
        nodes = leaves if height == 0 else levels[height - 1]
        at_root = nodes.shape[1] == 1
        children = nodes if at_root else jnp.take_along_axis(nodes, block[:, :, None], axis=1)
        if height == 0:
            children = jnp.exp(children - top[:, None, None])
        child, rest = _choose(children, rest, _NO_MASS * (2 * _FAN_OUT) ** height)
        block = block * nodes.shape[-1] + child
    return block


def _choose(children: jax.Array, rest: jax.Array, no_mass: float) -> tuple[jax.Array, jax.Array]:
    """Of children [n, N or 1, width], the one that holds `rest` [n, N], and what is left in it.

    Only a child with mass is taken. Where rounding leaves a threshold past the last one's end,
    the last child with mass takes it, so that counts always add up to N.
    """
    width = children.shape[-1]
    ends = jnp.cumsum(children, axis=-1)
    has_mass = children > no_mass
    last = width - 1 - jnp.argmax(has_mass[:, :, ::-1], axis=-1).astype(jnp.int32)
    inside = has_mass & (ends > rest[:, :, None])
    places = jnp.arange(width, dtype=jnp.int32)
    child = jnp.minimum(jnp.min(jnp.where(inside, places, width), axis=-1), last)
    starts = jnp.broadcast_to(ends - children, inside.shape)
    start = jnp.take_along_axis(starts, child[:, :, None], axis=-1)[:, :, 0]
    return child, jnp.maximum(rest - start, 0.0)


def _run_lengths(ids: jax.Array) -> jax.Array:
    """Counts [n, N] of equal neighbours in sorted `ids`, at each run's first place, else 0."""
    draws = ids.shape[-1]
    places = jnp.broadcast_to(jnp.arange(draws), ids.shape)
    is_start = jnp.concatenate(
        [jnp.ones_like(ids[:, :1], bool), ids[:, 1:] != ids[:, :-1]], axis=-1
    )
    starts = jnp.where(is_start, places, draws)
    next_start = jax.lax.cummin(starts, axis=1, reverse=True)
    next_start = jnp.concatenate(
        [next_start[:, 1:], jnp.full_like(next_start[:, :1], draws)], axis=-1
    )
    return jnp.where(is_start, next_start - places, 0).astype(jnp.int32)
