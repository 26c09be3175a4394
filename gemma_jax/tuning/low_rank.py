"""Matrices with low-rank updates beside them, which are multiplied one factor after the other."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from gemma_jax.model.matrix import Matrix, as_array, lookup, multiply, scores


def update(a: Any, b: Any, *, scale: float, stacked: bool) -> Any:
    """scale * A B in the shape of the matrix, of arrays of NumPy or JAX."""
    front, rank = a.shape[: int(stacked)], a.shape[-1]
    product = a.reshape(*front, -1, rank) @ b.reshape(*front, rank, -1)
    shape = (*a.shape[:-1], *b.shape[len(front) + 1 :])
    return product.reshape(shape) * scale


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["base", "a", "b", "key"],
    meta_fields=["scale", "dropout"],
)
@dataclasses.dataclass(frozen=True)
class LowRank(Matrix):
    """base + scale * A B, multiplied one factor after the other."""

    base: Any
    a: Array  # [in..., R]
    b: Array  # [R, out...]
    key: Array | None  # for dropout
    scale: float
    dropout: float

    def astype(self, dtype: Any) -> "LowRank":
        cast = {name: getattr(self, name).astype(dtype) for name in ("base", "a", "b")}
        return dataclasses.replace(self, **cast)

    def multiply(self, x: Array, inputs: int) -> Array:
        added = multiply(multiply(self._dropped(x), self.a, inputs), self.b)
        return multiply(x, self.base, inputs) + added * self.scale

    def lookup(self, ids: Array) -> Array:
        return lookup(self.base, ids, self.a.dtype) + multiply(self.a[ids], self.b) * self.scale

    def scores(self, x: Array) -> Array:
        low = jnp.einsum("...D,RD->...R", x, self.b)
        return scores(x, self.base) + scores(low, self.a) * self.scale

    def array(self) -> Array:
        base = as_array(self.base)
        return base + update(self.a, self.b, scale=self.scale, stacked=False).astype(base.dtype)

    def _dropped(self, x: Array) -> Array:
        if self.key is None:
            return x
        kept = jax.random.bernoulli(self.key, 1 - self.dropout, x.shape)
        return jnp.where(kept, x / (1 - self.dropout), jnp.zeros((), x.dtype))


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["base", "a", "b", "rows"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Bank(Matrix):
    """base + A B of the adapter that each row of a batch asks for; K adapters, scale within B."""

    base: Any
    a: Array  # [K, in..., R]
    b: Array  # [K, R, out...]
    rows: Array | None  # int32 [B]

    def astype(self, dtype: Any) -> "Bank":
        cast = {name: getattr(self, name).astype(dtype) for name in ("base", "a", "b")}
        return dataclasses.replace(self, **cast)

    def for_rows(self, rows: Array) -> "Bank":
        return dataclasses.replace(self, rows=rows)

    def multiply(self, x: Array, inputs: int) -> Array:
        (B, rank), lead = (len(x), self.a.shape[-1]), x.shape[: x.ndim - inputs]
        a = self.a[self.rows].reshape(B, -1, rank)
        low = jnp.einsum("BTI,BIR->BTR", x.reshape(B, -1, a.shape[1]), a)
        return multiply(x, self.base, inputs) + self._widen(low, lead)

    def lookup(self, ids: Array) -> Array:
        assert self.rows is not None
        rows = self.rows.reshape(-1, *[1] * (ids.ndim - 1))
        low = self.a[rows, ids].reshape(len(ids), -1, self.a.shape[-1])
        return lookup(self.base, ids, self.a.dtype) + self._widen(low, ids.shape)

    def scores(self, x: Array) -> Array:
        K, V = self.a.shape[:2]
        low = jnp.einsum("BTD,BRD->BTR", x.reshape(len(x), -1, x.shape[-1]), self.b[self.rows])
        # Zeros for the other adapters: to gather [B, V, R] would take more.
        chosen = jax.nn.one_hot(self.rows, K, dtype=low.dtype)
        added = jnp.einsum("BTR,BK,KVR->BTV", low, chosen, self.a)
        return scores(x, self.base) + added.reshape(*x.shape[:-1], V).astype(jnp.float32)

    def array(self) -> Array:
        raise NotImplementedError("a bank is a matrix a row of a batch, and no single array")

    def _widen(self, low: Array, lead: tuple[int, ...]) -> Array:
        """[B, T, R] to [B, ..., out...]."""
        b = self.b[self.rows]
        wide = jnp.einsum("BTR,BRO->BTO", low, b.reshape(*b.shape[:2], -1))
        return wide.reshape(*lead, *b.shape[2:])
