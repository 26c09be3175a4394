"""A [V, D] table of the vocabulary among devices, and the lookup of tokens in it.

Tokens are split over the batch axes. Where such an axis splits the table too (its D, as a rule),
that is for storage: the table is gathered before it is used, and its gradient summed and scattered
back. Where another axis splits V, its devices hold the same tokens and work on a part of the
vocabulary each. XLA, left to itself, would be free to gather tokens instead.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from gemma_jax.sharding import current_layout


@dataclasses.dataclass(frozen=True)
class TableParts:
    """Where the parts of a table lie while each device works on its own tokens.

    `table` and `rows` are the partitions of the table and of arrays with tokens in front. The
    methods are for use within a `shard_map` with these.
    """

    mesh: Mesh
    table: PartitionSpec
    rows: PartitionSpec
    row_axes: tuple[str, ...]  # mesh axes that split the tokens
    vocab_axis: str | None  # the mesh axis over which the vocabulary stays split
    gathered: tuple[tuple[int, str], ...]  # (dimension, mesh axis)

    def vocab_size(self, whole: int) -> int:
        """Rows of the table that a device uses, of `whole` in all."""
        return whole // self.mesh.shape[self.vocab_axis] if self.vocab_axis else whole

    def gather(self, part: Array) -> Array:
        """The [V / n, D] table that this device uses, from the part that it stores."""
        for dimension, axis in self.gathered:
            part = jax.lax.all_gather(part, axis, axis=dimension, tiled=True)
        return part

    def scatter(self, gradient: Array) -> Array:
        """From the gradient of a used table, by own tokens, that of the stored part, by all."""
        summed = self.row_axes
        for dimension, axis in self.gathered:
            if axis in summed:
                gradient = jax.lax.psum_scatter(
                    gradient, axis, scatter_dimension=dimension, tiled=True
                )
                summed = tuple(one for one in summed if one != axis)
            else:  # its devices had the same tokens
                size = gradient.shape[dimension] // self.mesh.shape[axis]
                start = jax.lax.axis_index(axis) * size
                gradient = jax.lax.dynamic_slice_in_dim(gradient, start, size, dimension)
        return jax.lax.psum(gradient, summed) if summed else gradient


def table_parts(shape: tuple[int, ...], num_rows: int) -> TableParts | None:
    """The parts of a [V, D] table in the active layout, None without one of several devices.

    `num_rows` is the leading dimension of the tokens' arrays.
    """
    layout = current_layout()
    if layout is None:
        return None
    stored = layout.spec(("vocab", "embed"), shape)
    rows = layout.spec(("batch",), (num_rows,))
    axes = rows[0] or ()
    row_axes = (axes,) if isinstance(axes, str) else tuple(axes)
    vocab, embed = stored
    splits = vocab is not None and vocab not in layout.rules.batch
    gathered = [(1, embed), (0, None if splits else vocab)]
    return TableParts(
        layout.mesh,
        stored,
        rows,
        row_axes,
        vocab if splits else None,
        tuple((dimension, axis) for dimension, axis in gathered if axis is not None),
    )


def own_ids(ids: Int[Array, "*n"], size: int, axis: str | None) -> tuple[Array, Array]:
    """(places, whether they are here) of ids in this device's `size` rows of a table whose V is
    split over `axis`; the place of one that is not here is `size`."""
    if axis is None:
        return ids, jnp.ones(ids.shape, bool)
    places = ids - jax.lax.axis_index(axis) * size
    here = (places >= 0) & (places < size)
    return jnp.where(here, places, size), here


class _Lookup(NamedTuple):
    dtype: Any
    shape: tuple[int, ...]  # of the table
    table_dtype: Any


def lookup(table: Float[Array, "V D"], ids: Int[Array, "B T"], dtype: Any) -> Float[Array, "B T D"]:
    """`table[ids]` in `dtype`; the gradient of the table is summed in float32."""
    if current_layout() is None:
        return table[ids].astype(dtype)
    return _lookup(_Lookup(jnp.dtype(dtype), table.shape, table.dtype), table, ids)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _lookup(settings: _Lookup, table: Array, ids: Array) -> Array:
    parts = table_parts(settings.shape, ids.shape[0])
    assert parts is not None

    def local(table: Array, ids: Array) -> Array:
        table = parts.gather(table.astype(settings.dtype))
        places, here = own_ids(ids, table.shape[0], parts.vocab_axis)
        found = jnp.where(here[..., None], table.at[places].get(mode="clip"), 0)
        return jax.lax.psum(found, parts.vocab_axis) if parts.vocab_axis else found

    return jax.shard_map(
        local,
        mesh=parts.mesh,
        in_specs=(parts.table, parts.rows),
        out_specs=parts.rows,
        check_vma=False,
    )(table, ids)


def _lookup_forward(settings: _Lookup, table: Array, ids: Array) -> tuple[Array, Array]:
    return _lookup(settings, table, ids), ids


def _lookup_backward(settings: _Lookup, ids: Array, gradient: Array) -> tuple[Array, None]:
    parts = table_parts(settings.shape, ids.shape[0])
    assert parts is not None
    size = parts.vocab_size(settings.shape[0])

    def local(ids: Array, gradient: Array) -> Array:
        places, _ = own_ids(ids, size, parts.vocab_axis)
        summed = jnp.zeros((size, gradient.shape[-1]), jnp.float32)
        return parts.scatter(summed.at[places].add(gradient.astype(jnp.float32), mode="drop"))

    d_table = jax.shard_map(
        local,
        mesh=parts.mesh,
        in_specs=(parts.rows, parts.rows),
        out_specs=parts.table,
        check_vma=False,
    )(ids, gradient)
    return d_table.astype(settings.table_dtype), None


_lookup.defvjp(_lookup_forward, _lookup_backward)
