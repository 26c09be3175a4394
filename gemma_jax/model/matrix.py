"""What may stand in the place of a matrix in the parameter tree.

The model multiplies by its matrices through `multiply`, `lookup` and `scores`. An array does what
one expects; a `Matrix` does the same in its own way, without ever being the array: packed in four
bits, say, or with a low-rank update beside it. So adapters are functions from one parameter tree to
another, and the model learns nothing of them.
"""

import abc
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gemma_jax.ops.table import lookup as table_lookup

_FEW_ROWS = 64


class Matrix(abc.ABC):
    """A matrix [in..., out...], or a table [V, D].

    Subclasses are pytree nodes whose leaves have the stacked layers in front, so that a scan
    slices them like arrays.
    """

    @abc.abstractmethod
    def astype(self, dtype: Any) -> "Matrix":
        """The same matrix, which multiplies in `dtype`."""

    @abc.abstractmethod
    def multiply(self, x: Array, inputs: int) -> Array:
        """[..., in...] to [..., out...]; `inputs` counts the dimensions that are summed over."""

    @abc.abstractmethod
    def lookup(self, ids: Array) -> Array:
        """The rows of a table, [..., D]."""

    @abc.abstractmethod
    def scores(self, x: Array) -> Array:
        """float32 products of [..., D] with all rows of a table, [..., V]."""

    @abc.abstractmethod
    def array(self) -> Array:
        """All of it, for what needs it whole."""

    def for_rows(self, rows: Array) -> "Matrix":
        """The matrix for a batch whose row i asks for variant `rows[i]`, where there are any."""
        return self


def multiply(x: Float[Array, "*b"], weight: Any, inputs: int = 1) -> Float[Array, "*c"]:
    """Activations [..., in...] times a matrix [in..., out...] of `inputs` input dimensions."""
    if isinstance(weight, Matrix):
        return weight.multiply(x, inputs)
    if inputs > 1 and math.prod(x.shape[: x.ndim - inputs]) <= _FEW_ROWS:
        # As one contracted dimension, or else XLA copies the matrix into that form, which takes
        # longer than the product with a few tokens.
        x = x.reshape(*x.shape[: x.ndim - inputs], -1)
        weight, inputs = weight.reshape(-1, *weight.shape[inputs:]), 1
    own = tuple(range(x.ndim - 1, x.ndim - inputs - 1, -1))
    theirs = tuple(range(inputs - 1, -1, -1))
    return jax.lax.dot_general(x, weight, ((own, theirs), ((), ())))


def lookup(table: Any, ids: Int[Array, "*b"], dtype: Any) -> Float[Array, "*b D"]:
    """Rows of a table, in `dtype`."""
    if isinstance(table, Matrix):
        return table.astype(dtype).lookup(ids)
    return table_lookup(table, ids, dtype)


def scores(x: Float[Array, "*b D"], table: Any) -> Float[Array, "*b V"]:
    """float32 products with every row of a table; the product is taken in the type of `x`."""
    if isinstance(table, Matrix):
        return table.astype(x.dtype).scores(x)
    return jnp.einsum("...D,VD->...V", x, table.astype(x.dtype), preferred_element_type=jnp.float32)


def as_array(weight: Any) -> Array:
    return weight.array() if isinstance(weight, Matrix) else weight


def is_matrix(x: Any) -> bool:
    return isinstance(x, Matrix)


def select_rows(params: Any, rows: Int[Array, " B"]) -> Any:
    """Parameters for a batch whose row i asks for variant `rows[i]` (see `Matrix.for_rows`)."""

    def choose(path: tuple, weight: Any) -> Any:
        if not is_matrix(weight):
            return weight
        if path[0].key != "periods":
            return weight.for_rows(rows)
        stacked = jax.tree.leaves(weight)[0].shape[0]  # each layer of a scan takes its own copy
        return weight.for_rows(jnp.broadcast_to(rows, (stacked, *rows.shape)))

    return jax.tree.map_with_path(choose, params, is_leaf=is_matrix)
