"""The KV cache: a ring of `sliding_window` slots for a local layer, full length for a global one.

A key of position p lies in slot p % C. Each slot remembers its position, so a reader needs no
order, and sequences of different lengths share a batch. This is what makes Gemma 3's cache small
(arXiv 2503.19786, Figures 5 and 6).

Among devices a cache is split by sequences and kv heads. Where the kv heads cannot be split (one,
say) its slots are: each device reads its share of them for every token, and a maximum, a sum and an
output of the size of one token join what the devices saw. Splitting head_dim would join all scores.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from gemma_jax.model.config import LOCAL, ModelConfig
from gemma_jax.sharding import Layout, current_layout, pin

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
        return _laid_out(keys, values, jnp.full(shape[:-2], EMPTY, jnp.int32))

    stacked = config.attn_pattern if config.num_periods else ""
    return Cache(
        tuple(layer(letter, config.num_periods) for letter in stacked),
        tuple(layer(letter) for letter in config.remainder),
    )


def cache_axes(layout: Layout, shape: tuple[int, ...]) -> tuple[str | None, ...]:
    """Logical axes of cached keys [..., B, C, K, H] or values: kv heads, or slots instead."""
    axes = (*[None] * (len(shape) - 4), "batch", None, "kv_heads", None)
    return axes if layout.spec(axes, shape)[-2] else (*axes[:-3], "slots", None, None)


def _laid_out(k: Array, v: Array, positions: Array) -> LayerCache:
    layout = current_layout()
    if layout is None:
        return LayerCache(k, v, positions)
    axes = cache_axes(layout, k.shape)
    return LayerCache(pin(k, *axes), pin(v, *axes), pin(positions, *axes[:-2]))


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
    layout = current_layout()
    if layout is None:
        return _put(cache, k, v, positions, slot)
    kept = layout.spec(cache_axes(layout, cache.k.shape), cache.k.shape)
    rows, axis = kept[0], kept[1]

    def local(cache: LayerCache, k: Array, v: Array, positions: Array, slot: Array) -> LayerCache:
        if axis is not None:
            size = cache.positions.shape[-1]
            slot = slot - jax.lax.axis_index(axis) * size
            slot = jnp.where((slot >= 0) & (slot < size), slot, size)
        return _put(cache, k, v, positions, slot)

    token, place = PartitionSpec(rows, None, kept[2], None), PartitionSpec(rows)
    whole: Any = LayerCache(kept, kept, PartitionSpec(rows, axis))  # type: ignore[arg-type]
    return jax.shard_map(
        local,
        mesh=layout.mesh,
        in_specs=(whole, token, token, place, place),
        out_specs=whole,
        check_vma=False,
    )(cache, k, v, positions, slot)


def _put(cache: LayerCache, k: Array, v: Array, positions: Array, slot: Array) -> LayerCache:
    row = jnp.arange(k.shape[0], dtype=jnp.int32)[:, None]
    return LayerCache(
        cache.k.at[row, slot].set(k, mode="drop"),
        cache.v.at[row, slot].set(v, mode="drop"),
        cache.positions.at[row, slot].set(positions, mode="drop"),
    )


def repeat_rows(cache: Cache, count: int) -> Cache:
    """The cache of a batch that holds each row of this one `count` times in a row."""

    def repeat(layer: LayerCache, axis: int) -> LayerCache:
        k, v, positions = (jnp.repeat(part, count, axis=axis) for part in layer)
        return _laid_out(k, v, positions)

    return Cache(
        tuple(repeat(layer, 1) for layer in cache.periods),
        tuple(repeat(layer, 0) for layer in cache.remainder),
    )


def begin_with(empty: Cache, first: Cache) -> Cache:
    """`empty`, each row of it holding what the one row of `first` does, which has room for less."""

    def fill(empty: LayerCache, first: LayerCache) -> LayerCache:
        # A slot is position % slots: the same in both, or no position has come around yet.
        n = min(empty.positions.shape[-1], first.positions.shape[-1])
        return _laid_out(
            empty.k.at[..., :n, :, :].set(first.k[..., :n, :, :]),
            empty.v.at[..., :n, :, :].set(first.v[..., :n, :, :]),
            empty.positions.at[..., :n].set(first.positions[..., :n]),
        )

    return Cache(
        tuple(fill(*pair) for pair in zip(empty.periods, first.periods, strict=True)),
        tuple(fill(*pair) for pair in zip(empty.remainder, first.remainder, strict=True)),
    )
