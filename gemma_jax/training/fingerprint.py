"""A number for each array of a tree that any changed bit changes: what a checkpoint is checked by.

It is of the values and their places in the array, in whole numbers modulo 2^32, so it depends on no
mesh, number of processes or way of writing. One changed element is always noticed, what changes
several at random or puts them elsewhere with probability 1 - 2^-32.
"""

from typing import Any

import jax
import jax.numpy as jnp


def fingerprints(tree: Any) -> dict[str, int]:
    """By the path of each array; all processes must call it together."""
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(tree)]
    return dict(zip(paths, map(int, jax.device_get(_all(jax.tree.leaves(tree)))), strict=True))


@jax.jit
def _all(arrays: list[jax.Array]) -> list[jax.Array]:
    return [_one(x) for x in arrays]


def _one(x: jax.Array) -> jax.Array:
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    size = 8 * x.dtype.itemsize
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{size}")).astype(jnp.uint32)
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis in range(x.ndim):
        own = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        place = place * jnp.uint32(x.shape[axis]) + own
    # Odd weights: no change of one element is multiplied away.
    return jnp.sum(bits * (jnp.uint32(2) * place + jnp.uint32(1)), dtype=jnp.uint32)
