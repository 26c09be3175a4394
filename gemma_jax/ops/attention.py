"""Grouped-query attention behind one function.

`reference` is the dense oracle. `banded` is exact too and never builds the T x T scores of a
sliding-window layer: queries in blocks of at least one window see their own block of keys and the
one before. To add a backend for a piece of hardware, write a function of the same signature, say
in `_choose` when it applies, and let it refuse what it cannot do exactly.

Among devices, XLA partitions `reference`. Every other backend is called in a `shard_map`, once a
device with its own sequences and heads, so it may be anything that a single device can run.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float

from gemma_jax.ops import cudnn_attention, splash_attention
from gemma_jax.ops.hardware import on_hopper, on_tpu
from gemma_jax.ops.masks import MaskSpec, dense_mask, visible
from gemma_jax.sharding import current_layout

Backend = Literal["auto", "reference", "banded", "cudnn", "splash"]

MASKED = -2.3819763e38  # finite, so that a row with nothing to see gives no NaN
_MIN_BLOCK = 128  # smaller blocks lose more to overhead than they save
_DENSE_UP_TO = 512  # below this many keys a global layer is not cut into blocks
_MAX_GLOBAL_BLOCKS = 8  # each is a matmul of its own shape, and compile time grows with them


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    spec: MaskSpec,
    *,
    softcap: float | None = None,
    backend: Backend = "auto",
) -> Float[Array, "B T N H"]:
    """Softmax attention; N query heads share K kv heads in groups of N / K.

    The query comes already scaled. Scores and softmax are float32 whatever the inputs are.
    `softcap` squashes the scores to (-softcap, softcap) before the mask (Gemma 2).
    """
    if backend == "auto":
        backend = _choose(q, k, spec, softcap)
    if backend == "reference":
        return _reference(q, k, v, spec, softcap)
    run = {"banded": _banded, "cudnn": _cudnn, "splash": _splash}[backend]
    return _on_each_device(run, q, k, v, spec, softcap)


def _choose(q: Array, k: Array, spec: MaskSpec, softcap: float | None) -> Backend:
    in_order = q.shape[1] == k.shape[1] and spec.q_positions is None and spec.k_positions is None
    if not in_order:
        return "reference"
    if on_hopper() and cudnn_attention.can_do(q, k, spec, softcap):
        return "cudnn"
    return "splash" if on_tpu() and splash_attention.can_do(q, k, spec) else "banded"


def _on_each_device(
    run: Callable[..., Array],
    q: Array,
    k: Array,
    v: Array,
    spec: MaskSpec,
    softcap: float | None,
) -> Float[Array, "B T N H"]:
    """Calls a backend for each device's own sequences and query heads, with their kv heads."""
    layout = current_layout()
    if layout is None:
        return run(q, k, v, spec, softcap)
    queries = layout.spec(("batch", None, "heads", None), q.shape)
    keys = layout.spec(("batch", None, "kv_heads", None), k.shape)
    axis, group = queries[2], q.shape[2] // k.shape[2]
    together = keys[2] == axis
    if not together:  # the kv heads cannot be split as the query heads are
        keys = PartitionSpec(keys[0])

    masks, structure = jax.tree.flatten(spec)

    def local(q: Array, k: Array, v: Array, masks: list[Array]) -> Array:
        if not together and axis is not None:
            k, v = (_heads_of(x, jax.lax.axis_index(axis), q.shape[2], group) for x in (k, v))
        return run(q, k, v, jax.tree.unflatten(structure, masks), softcap)

    return jax.shard_map(
        local,
        mesh=layout.mesh,
        in_specs=(queries, keys, keys, [layout.spec(("batch", None), x.shape) for x in masks]),
        out_specs=queries,
        check_vma=False,
    )(q, k, v, masks)


def _heads_of(x: Array, device: Array, count: int, group: int) -> Array:
    """Of all kv heads [B, S, K, H] those of the query heads device * count and the next ones."""
    if group % count == 0:  # they share one
        return jax.lax.dynamic_slice_in_dim(x, device * count // group, 1, axis=2)
    return jnp.take(x, (device * count + jnp.arange(count, dtype=jnp.int32)) // group, axis=2)


def _reference(
    q: Array, k: Array, v: Array, spec: MaskSpec, softcap: float | None
) -> Float[Array, "B T N H"]:
    return _attend(q, k, v, dense_mask(spec, q.shape[1], k.shape[1]), softcap)


# The backward pass computes scores and weights again from q and k: kept, they would be the largest
# tensors of a layer, and reading them back takes longer than their matmul.
@functools.partial(jax.checkpoint, static_argnums=4)
def _attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Bool[Array, "b T S"],
    softcap: float | None,
) -> Float[Array, "B T N H"]:
    B, T, N, H = q.shape
    K = k.shape[2]
    grouped = q.reshape(B, T, K, N // K, H)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", grouped, k, preferred_element_type=jnp.float32)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(mask[:, None, None], scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights, v).reshape(B, T, N, H)


def _cudnn(
    q: Array, k: Array, v: Array, spec: MaskSpec, softcap: float | None
) -> Float[Array, "B T N H"]:
    if not cudnn_attention.can_do(q, k, spec, softcap):
        raise ValueError(
            f"cuDNN has no attention for {q.dtype} queries {q.shape}, keys {k.shape} and "
            f"softcap={softcap}"
        )
    return cudnn_attention.cudnn_attention(q, k, v, spec, otherwise=_query_blocks)


def _splash(
    q: Array, k: Array, v: Array, spec: MaskSpec, softcap: float | None
) -> Float[Array, "B T N H"]:
    if not splash_attention.can_do(q, k, spec):
        raise ValueError(
            f"splash attention has no kernel for queries {q.shape} and keys {k.shape}; a sequence "
            "must be a multiple of 128 tokens, its keys in order"
        )
    return splash_attention.splash_attention(q, k, v, spec, softcap)


def _query_blocks(q: Array, k: Array, v: Array, spec: MaskSpec) -> Float[Array, "B T N H"]:
    """Exact, slow and a small program: a loop over blocks of queries, each against all keys."""
    B, T, N, H = q.shape
    count = math.ceil(T / _DENSE_UP_TO)
    pad = count * _DENSE_UP_TO - T

    def blocks(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2), mode="edge")
        return jnp.moveaxis(x.reshape(B, count, _DENSE_UP_TO, *x.shape[2:]), 1, 0)

    def one(block: tuple[Array, Array, Array]) -> Array:
        part, positions, ids = block
        mask = dense_mask(
            dataclasses.replace(spec, q_positions=positions, q_segment_ids=ids), _DENSE_UP_TO, T
        )
        return _attend(part, k, v, mask, None)

    positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    ids = jnp.ones_like(positions) if spec.q_segment_ids is None else spec.q_segment_ids
    out = jax.lax.map(one, (blocks(q), blocks(positions), blocks(ids)))
    return jnp.moveaxis(out, 0, 1).reshape(B, count * _DENSE_UP_TO, N, H)[:, :T]


def _banded(
    q: Array, k: Array, v: Array, spec: MaskSpec, softcap: float | None
) -> Float[Array, "B T N H"]:
    T = q.shape[1]
    if q.shape[1] != k.shape[1] or spec.q_positions is not None or spec.k_positions is not None:
        raise ValueError("banded attention needs queries and keys of one sequence, in order")
    if spec.window is None:
        return _causal_blocks(q, k, v, spec, softcap)
    block = spec.window * math.ceil(_MIN_BLOCK / spec.window)
    if 2 * block >= T:
        return _causal_blocks(q, k, v, spec, softcap)
    return _window_blocks(q, k, v, spec, softcap, block)


def _causal_blocks(
    q: Array, k: Array, v: Array, spec: MaskSpec, softcap: float | None
) -> Float[Array, "B T N H"]:
    """Each block of queries against the keys up to its own end: half the work of all pairs."""
    T = q.shape[1]
    if T <= _DENSE_UP_TO:
        return _reference(q, k, v, spec, softcap)
    block = max(_DENSE_UP_TO, math.ceil(T / _MAX_GLOBAL_BLOCKS))
    outputs = []
    for start in range(0, T, block):
        end = min(start + block, T)
        positions = jnp.arange(start, end, dtype=jnp.int32)[None]
        part = dataclasses.replace(
            spec,
            q_positions=positions,
            q_segment_ids=_cut(spec.q_segment_ids, start, end),
            k_segment_ids=_cut(spec.k_segment_ids, 0, end),
        )
        mask = dense_mask(part, end - start, end)
        outputs.append(_attend(q[:, start:end], k[:, :end], v[:, :end], mask, softcap))
    return jnp.concatenate(outputs, axis=1)


def _cut(x: Array | None, start: int, end: int) -> Array | None:
    return None if x is None else x[:, start:end]


def _window_blocks(
    q: Array, k: Array, v: Array, spec: MaskSpec, softcap: float | None, block: int
) -> Float[Array, "B T N H"]:
    B, T, N, H = q.shape
    K = k.shape[2]
    count = math.ceil(T / block)
    pad = count * block - T

    def blocks(x: Array) -> Array:
        """[B, T, ...] -> [B, count, block, ...], zeros at the end (the future: never seen)."""
        x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
        return x.reshape(B, count, block, *x.shape[2:])

    def with_previous(x: Array) -> Array:
        """[B, count, block, ...] -> [B, count, 2 * block, ...]; zeros before the first block."""
        before = jnp.pad(x[:, :-1], ((0, 0), (1, 0)) + ((0, 0),) * (x.ndim - 2))
        return jnp.concatenate([before, x], axis=2)

    queries = jnp.arange(block, dtype=jnp.int32)
    keys = jnp.arange(-block, block, dtype=jnp.int32)
    mask = visible(spec, queries[:, None], keys[None])[None, None]
    exists = (jnp.arange(count, dtype=jnp.int32)[:, None] > 0) | (keys >= 0)[None]
    mask = mask & exists[None, :, None]
    if spec.q_segment_ids is not None and spec.k_segment_ids is not None:
        q_ids, k_ids = blocks(spec.q_segment_ids), with_previous(blocks(spec.k_segment_ids))
        mask = mask & (q_ids[..., :, None] == k_ids[..., None, :])
    mask = jnp.broadcast_to(mask, (B, count, block, 2 * block))

    out = _attend(
        blocks(q).reshape(B * count, block, N, H),
        with_previous(blocks(k)).reshape(B * count, 2 * block, K, H),
        with_previous(blocks(v)).reshape(B * count, 2 * block, K, H),
        mask.reshape(B * count, block, 2 * block),
        softcap,
    )
    return out.reshape(B, count * block, N, H)[:, :T]
