"""The KV cache: a ring of `sliding_window` slots for a local layer, full length for a global one.

A key of position p lies in slot p % C. Each slot remembers its position, so a reader needs no
order, and sequences of different lengths share a batch. This is what makes Gemma 3's cache small
(arXiv 2503.19786, Figures 5 and 6).
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gemma_jax.model.config import LOCAL, ModelConfig

EMPTY = -1


class LayerCache(NamedTuple):
    """Keys (after norm and RoPE) and values of one layer; `positions` is EMPTY in unused slots."""

    k: Float[Array, "*p B C K H"]
    v: Float[Array, "*p B C K H"]
    positions: Int[Array, "*p B C"]


class Cache(NamedTuple):
    """`periods`: one entry a letter of the pattern, stacked over periods; `remainder`: the rest."""

    periods: tuple[LayerCache, ...]
    remainder: tuple[LayerCache, ...]


def num_slots(config: ModelConfig, letter: str, length: int) -> int:
    return min(config.sliding_window, length) if letter == LOCAL else length


def init_cache(config: ModelConfig, batch_size: int, length: int) -> Cache:
    """An empty cache for sequences of up to `length` tokens, in the compute dtype."""

    def layer(letter: str, *stack: int) -> LayerCache:
        slots = num_slots(config, letter, length)
        shape = (*stack, batch_size, slots, config.num_kv_heads, config.head_dim)
        # Buffers of their own, so that a program may take each over (donation).
        keys, values = (jnp.zeros(shape, config.compute_dtype) for _ in range(2))
        return LayerCache(keys, values, jnp.full(shape[:-2], EMPTY, jnp.int32))

    stacked = config.attn_pattern if config.num_periods else ""
    return Cache(
        tuple(layer(letter, config.num_periods) for letter in stacked),
        tuple(layer(letter) for letter in config.remainder),
    )


def cache_bytes(config: ModelConfig, length: int) -> list[int]:
    """Bytes of keys and values that each layer holds for one sequence of `length` tokens."""
    per_slot = 2 * config.num_kv_heads * config.head_dim * jnp.dtype(config.compute_dtype).itemsize
    return [num_slots(config, letter, length) * per_slot for letter in config.layer_letters]


def write(
    cache: LayerCache,
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    positions: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
) -> LayerCache:
    """Puts the valid tokens into their slots. Of more tokens than slots, the last ones stay."""
    slots = cache.positions.shape[-1]
    last = jnp.where(valid, positions, EMPTY).max(axis=-1, keepdims=True)
    keep = valid & (positions > last - slots)
    slot = jnp.where(keep, positions % slots, slots)  # out of bounds: dropped by the scatter
    row = jnp.arange(k.shape[0], dtype=jnp.int32)[:, None]
    return LayerCache(
        cache.k.at[row, slot].set(k, mode="drop"),
        cache.v.at[row, slot].set(v, mode="drop"),
        cache.positions.at[row, slot].set(positions, mode="drop"),
    )


def take_rows(cache: Cache, rows: Int[Array, " b"]) -> Cache:
    """The cache of a batch made of `rows` of this one; a row may be taken several times."""

    def take(layer: LayerCache, axis: int) -> LayerCache:
        return LayerCache(*(jnp.take(part, rows, axis=axis) for part in layer))

    return Cache(
        tuple(take(layer, 1) for layer in cache.periods),
        tuple(take(layer, 0) for layer in cache.remainder),
    )


def begin_with(empty: Cache, first: Cache) -> Cache:
    """`empty`, each row of it holding what the one row of `first` does, which has room for less."""

    def fill(empty: LayerCache, first: LayerCache) -> LayerCache:
        # A slot is position % slots: the same in both, or no position has come around yet.
        n = min(empty.positions.shape[-1], first.positions.shape[-1])
        return LayerCache(
            empty.k.at[..., :n, :, :].set(first.k[..., :n, :, :]),
            empty.v.at[..., :n, :, :].set(first.v[..., :n, :, :]),
            empty.positions.at[..., :n].set(first.positions[..., :n]),
        )

    return Cache(
        tuple(fill(*pair) for pair in zip(empty.periods, first.periods, strict=True)),
        tuple(fill(*pair) for pair in zip(empty.remainder, first.remainder, strict=True)),
    )
