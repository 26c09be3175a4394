"""A distribution over a large vocabulary, made ready for reading its inverse cumulative function.

The cumulative function over 262 144 ids is never formed. Their masses are summed in a tree of
fan-out 32, and a threshold walks down from the root, at each node into the child that holds it.
That saves passes over the logits, and its rounding errors are those of pairwise summation.

Where the vocabulary is split over devices, each sums the masses of its own ids up to nodes that lie
on one device whole; those few are exchanged, and the tree above them is the same everywhere. Then a
threshold walks down on the device that holds its node. The additions are those of one device, so
what is found is too.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gemma_jax.ops.hardware import on_gpu

_FAN_OUT = 32  # one cache line of floats
_LANES = 8  # floats that a processor adds at once
# A leaf with no more mass than this is never drawn. A node's bound is 2 * fan-out times that of its
# children: a sum above it proves that one child lies above its own, whatever the rounding.
_NO_MASS = 1e-34
_FAR = 60.0  # nats: no mass is over exp(60)


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


class MassTree(NamedTuple):
    """Masses exp(z - shift) of logits z, and their sums.

    `leaves` [n, blocks, width] are the logits, `shift` [n]; `levels` [n, blocks, width] the sums
    above them from below, `upper` those that all devices have, `total` [n] of all ids. `drift` [n]
    is the sum of exp(z - shift) (z - shift): with p = mass / total, entropy = log total -
    drift / total.
    """

    leaves: jax.Array
    shift: jax.Array
    levels: list[jax.Array]
    upper: list[jax.Array]
    total: jax.Array
    drift: jax.Array


def mass_tree(logits: jax.Array, label_logits: jax.Array, split: VocabSplit | None) -> MassTree:
    """Of float32 logits [n, V], of which -inf stands for no mass; with `split`, this device's
    columns. `label_logits` [n] are those of ids that are mostly likely: on a GPU they take the
    place of the maximum."""
    leaves = _blocks(logits, -jnp.inf)
    masses = _in_one_pass(leaves, label_logits, split) if on_gpu() else _in_passes(leaves, split)
    levels, upper, total = _sum_tree(masses.sums, split)
    drift = masses.drift if split is None else jax.lax.psum(masses.drift, split.axis)
    return MassTree(leaves, masses.shift, levels, upper, total, drift)


def find(tree: MassTree, thresholds: jax.Array, split: VocabSplit | None) -> jax.Array:
    """int32 [n, N]: the id whose stretch of the cumulative mass holds each of `thresholds` [n, N],
    which lie in [0, 1)."""
    return _walk_down(
        tree.levels, tree.upper, tree.leaves, tree.shift, thresholds * tree.total[:, None], split
    )


def _blocks(values: jax.Array, fill: float) -> jax.Array:
    """[n, size] -> [n, blocks, width]."""
    n, size = values.shape
    width = min(_FAN_OUT, size)
    return jnp.pad(values, ((0, 0), (0, -size % width)), constant_values=fill).reshape(n, -1, width)


class _Masses(NamedTuple):
    """Sums [n, blocks] of blocks of leaves, and what `MassTree` says of the others."""

    sums: jax.Array
    drift: jax.Array
    shift: jax.Array


def _in_passes(leaves: jax.Array, split: VocabSplit | None) -> _Masses:
    """The most probable id has mass 1, so the total lies between 1 and V."""
    top = jnp.max(leaves, axis=(1, 2))
    if split is not None:
        top = jax.lax.pmax(top, split.axis)
    sums = _add_up(jnp.exp(leaves - top[:, None, None]))
    # The barrier keeps the compiler from sharing terms of size [n, V] with the sums above, which
    # would write them to memory.
    shifted = leaves - jax.lax.optimization_barrier(top)[:, None, None]
    drift = jnp.sum(jnp.exp(shifted) * _finite(shifted), axis=(1, 2))
    return _Masses(sums, drift, top)


def _in_one_pass(leaves: jax.Array, label: jax.Array, split: VocabSplit | None) -> _Masses:
    """One reading of the logits gives all three. The maximum being unknown by then, the label takes
    its place: where a teacher believes in that less than exp(-60), the chunk is read once more."""
    n, blocks, width = leaves.shape
    rows = leaves.reshape(n * blocks, width)  # of one dimension, results have but one layout

    def read(shift: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        shifted = rows - jnp.broadcast_to(shift[:, None], (n, blocks)).reshape(-1, 1)
        mass = jnp.exp(shifted)
        zero, least = jnp.zeros((), jnp.float32), jnp.array(-jnp.inf, jnp.float32)
        sums, drifts, tops = jax.lax.reduce(
            (mass, mass * _finite(shifted), rows),
            (zero, zero, least),
            lambda a, b: (a[0] + b[0], a[1] + b[1], jnp.maximum(a[2], b[2])),
            (1,),
        )
        # What follows would otherwise be merged with this, and the passes be three again.
        found = jax.lax.optimization_barrier((sums, drifts, tops))
        sums, drifts, tops = (x.reshape(n, blocks) for x in found)
        return sums, drifts.sum(axis=1), tops.max(axis=1)

    shift = jnp.where(jnp.isfinite(label), label, 0.0)
    sums, drift, top = read(shift)
    if split is not None:
        top = jax.lax.pmax(top, split.axis)

    def far(state: _Masses) -> jax.Array:
        return top - state.shift > _FAR

    def again(state: _Masses) -> _Masses:
        shift = jnp.where(far(state), top, state.shift)
        return _Masses(*read(shift)[:2], shift)

    return jax.lax.while_loop(lambda state: far(state).any(), again, _Masses(sums, drift, shift))


def _finite(shifted: jax.Array) -> jax.Array:
    return jnp.maximum(shifted, -100.0)  # 0 * -inf becomes 0


def _sum_tree(
    sums: jax.Array, split: VocabSplit | None
) -> tuple[list[jax.Array], list[jax.Array], jax.Array]:
    """Sums of masses above the blocks of leaves: levels [n, blocks, width] from below, those of
    this device and those of all, and the total [n]."""
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
    shift: jax.Array,
    thresholds: jax.Array,
    split: VocabSplit | None,
) -> jax.Array:
    """The id [n, N] whose stretch of the cumulative mass holds each threshold."""
    node, rest, height = jnp.zeros(thresholds.shape, jnp.int32), thresholds, len(levels)
    for above in range(len(upper), 0, -1):
        node, rest = _descend(upper[above - 1], node, rest, height + above)
    if split is None:
        return _down_to_leaves(levels, leaves, shift, node, rest)
    nodes = (levels[-1] if levels else leaves).shape[1]  # of this device, where all know them
    first = jax.lax.axis_index(split.axis) * nodes
    here = (node >= first) & (node < first + nodes)
    node = jnp.clip(node - first, 0, nodes - 1)
    ids = _down_to_leaves(levels, leaves, shift, node, rest)
    ids = ids + jax.lax.axis_index(split.axis) * (leaves.shape[1] * leaves.shape[2])
    return jax.lax.psum(jnp.where(here, ids, 0), split.axis)


def _down_to_leaves(
    levels: list[jax.Array], leaves: jax.Array, shift: jax.Array, node: jax.Array, rest: jax.Array
) -> jax.Array:
    for height in range(len(levels), 0, -1):
        node, rest = _descend(levels[height - 1], node, rest, height)
    return _descend(leaves, node, rest, 0, shift)[0]


def _descend(
    nodes: jax.Array, block: jax.Array, rest: jax.Array, height: int, shift: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """From a block of `nodes` to the node in it that holds `rest`, and what is left in that."""
    at_root = nodes.shape[1] == 1
    children = nodes if at_root else jnp.take_along_axis(nodes, block[:, :, None], axis=1)
    if shift is not None:  # leaves are logits, all others masses
        children = jnp.exp(children - shift[:, None, None])
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
