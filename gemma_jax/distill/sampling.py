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

The draws of a token depend on its key and its logits alone, not on the batch around it.

Where the vocabulary is split over devices, each sums the masses of its own ids up to nodes that lie
on one device whole; those few are exchanged, and the tree above them is the same everywhere. Then a
threshold walks down on the device that holds its node. The additions are those of one device, so
the draws are too.
"""

import dataclasses
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from gemma_jax.ops.table import own_ids

Method = Literal["systematic", "multinomial"]
METHODS: tuple[str, ...] = get_args(Method)

_FAN_OUT = 32  # one cache line of floats
_LANES = 8  # floats that a processor adds at once
# A leaf with no more mass than this is never drawn. A node's bound is 2 * fan-out times that of its
# children: a sum above it proves that one child lies above its own, whatever the rounding.
_NO_MASS = 1e-34


@dataclasses.dataclass(frozen=True)
class VocabSplit:
    """A vocabulary split over the devices of a mesh axis, within a `shard_map`.

    Each holds `padded_size / devices` ids in a row; those from `vocab_size` on are not there.
    """

    axis: str
    devices: int
    vocab_size: int

    @property
    def height(self) -> int:
        """Of the nodes that are exchanged: the highest that no two devices share."""
        height = 1
        while self.vocab_size % (_FAN_OUT ** (height + 1) * self.devices) == 0:
            height += 1
        return height

    @property
    def padded_size(self) -> int:
        unit = _FAN_OUT**self.height * self.devices
        return -(-self.vocab_size // unit) * unit


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
    logits: jax.Array,
    labels: jax.Array,
    keys: jax.Array,
    *,
    draws: int,
    method: Method,
    split: VocabSplit | None = None,
) -> SampledTargets:
    """Draws `draws` ids a token from softmax(logits), with replacement.

    `logits` float32 [n, V] (-inf is allowed: such an id is never drawn), `labels` int [n], `keys`
    [n] as of `token_keys`. With `split`, `logits` are this device's columns of them. Holds a few
    arrays of that size: the caller bounds n. NaN logits give NaN statistics and meaningless draws.
    """
    leaves = _blocks(logits.astype(jnp.float32), -jnp.inf)
    top = jnp.max(leaves, axis=(1, 2))
    if split is not None:
        top = jax.lax.pmax(top, split.axis)
    levels, upper, total = _sum_tree(leaves, top, split)
    log_total = jnp.log(total)
    # With p = mass / total: entropy = log total - sum p (z - top). The barrier keeps the compiler
    # from sharing terms of size [n, V] with the sums above, which would write them to memory. The
    # bound makes 0 * -inf a 0.
    shifted = leaves - jax.lax.optimization_barrier(top)[:, None, None]
    drift = jnp.sum(jnp.exp(shifted) * jnp.maximum(shifted, -100.0), axis=(1, 2))
    label = _label_logit(logits, labels, split)
    if split is not None:
        drift = jax.lax.psum(drift, split.axis)

    thresholds = jax.vmap(lambda key: _thresholds(key, draws, method))(keys)
    ids = _walk_down(levels, upper, leaves, top, thresholds * total[:, None], split)
    ids = jnp.sort(ids, axis=-1)
    return SampledTargets(
        ids=ids,
        counts=_run_lengths(ids),
        label_logprob=label - top - log_total,
        entropy=log_total - drift / total,
    )


def _label_logit(logits: jax.Array, labels: jax.Array, split: VocabSplit | None) -> jax.Array:
    axis = None if split is None else split.axis
    places, here = own_ids(labels[:, None], logits.shape[1], axis)
    logit = jnp.take_along_axis(logits, places, axis=-1, mode="clip").astype(jnp.float32)
    if axis is not None:
        logit = jax.lax.psum(jnp.where(here, logit, 0.0), axis)
    return logit[:, 0]


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


def _sum_tree(
    leaves: jax.Array, top: jax.Array, split: VocabSplit | None
) -> tuple[list[jax.Array], list[jax.Array], jax.Array]:
    """Sums of masses above the leaves: levels [n, blocks, width] from below, those of this device
    and those of all, and the total [n].

    The most probable id has mass 1, so the total lies between 1 and V.
    """
    sums = _add_up(jnp.exp(leaves - top[:, None, None]))
    levels: list[jax.Array] = []
    if split is not None:
        while len(levels) + 1 < split.height:
            levels.append(_blocks(sums, 0.0))
            sums = _add_up(levels[-1])
        nodes = -(-split.vocab_size // _FAN_OUT**split.height)
        sums = jax.lax.all_gather(sums, split.axis, axis=1, tiled=True)[:, :nodes]
    upper: list[jax.Array] = []
    while sums.shape[-1] > 1:
        upper.append(_blocks(sums, 0.0))
        sums = _add_up(upper[-1])
    return levels, upper, sums[:, 0]


def _add_up(x: jax.Array) -> jax.Array:
    """Sums over the last axis in an order of its own. That of a reduction would be the compiler's
    choice, another one for each shape, and a draw close to the edge of an id would depend on it."""
    width = x.shape[-1]
    if width == _FAN_OUT:
        # Whole vectors first; fused with what follows, they would be taken apart.
        x = sum((x[..., i : i + _LANES] for i in range(_LANES, width, _LANES)), x[..., :_LANES])
        x = jax.lax.optimization_barrier(x)
    while (width := x.shape[-1]) > 1:
        if width % 2:
            x = jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, 1),))
        x = x[..., : x.shape[-1] // 2] + x[..., x.shape[-1] // 2 :]
    return x[..., 0]


def _walk_down(
    levels: list[jax.Array],
    upper: list[jax.Array],
    leaves: jax.Array,
    top: jax.Array,
    thresholds: jax.Array,
    split: VocabSplit | None,
) -> jax.Array:
    """The id [n, N] whose stretch of the cumulative mass holds each threshold."""
    node, rest, height = jnp.zeros(thresholds.shape, jnp.int32), thresholds, len(levels)
    for above in range(len(upper), 0, -1):
        node, rest = _descend(upper[above - 1], node, rest, height + above)
    if split is None:
        return _down_to_leaves(levels, leaves, top, node, rest)
    nodes = (levels[-1] if levels else leaves).shape[1]  # of this device, where all know them
    first = jax.lax.axis_index(split.axis) * nodes
    here = (node >= first) & (node < first + nodes)
    node = jnp.clip(node - first, 0, nodes - 1)
    ids = _down_to_leaves(levels, leaves, top, node, rest)
    ids = ids + jax.lax.axis_index(split.axis) * (leaves.shape[1] * leaves.shape[2])
    return jax.lax.psum(jnp.where(here, ids, 0), split.axis)


def _down_to_leaves(
    levels: list[jax.Array], leaves: jax.Array, top: jax.Array, node: jax.Array, rest: jax.Array
) -> jax.Array:
    for height in range(len(levels), 0, -1):
        node, rest = _descend(levels[height - 1], node, rest, height)
    return _descend(leaves, node, rest, 0, top)[0]


def _descend(
    nodes: jax.Array, block: jax.Array, rest: jax.Array, height: int, top: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """From a block of `nodes` to the node in it that holds `rest`, and what is left in that."""
    at_root = nodes.shape[1] == 1
    children = nodes if at_root else jnp.take_along_axis(nodes, block[:, :, None], axis=1)
    if top is not None:  # leaves are logits, all others masses
        children = jnp.exp(children - top[:, None, None])
    child, rest = _choose(children, rest, _NO_MASS * (2 * _FAN_OUT) ** height)
    return block * nodes.shape[-1] + child, rest


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
