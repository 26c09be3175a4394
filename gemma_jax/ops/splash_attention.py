"""Fused attention on TPUs: JAX's splash kernels, which visit the blocks that a mask leaves alone.

The kernels are those of `jax.experimental.pallas.ops.tpu.splash_attention` (FlashAttention, arXiv
2307.08691, over a sparse set of blocks). They take one sequence, with segment ids; a batch is a
`vmap`. Everywhere but on a TPU they are interpreted, which is for tests.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gemma_jax.ops.hardware import on_tpu
from gemma_jax.ops.masks import MaskSpec

_LANES = 128  # lengths are multiples of it
_BLOCKS = (512, 256, 128)  # queries and keys at once, the first that divides the length


def can_do(q: Array, k: Array, spec: MaskSpec) -> bool:
    """Whether the kernels compute exactly this. Keys must be those of the queries, in order."""
    return (
        q.shape[1] == k.shape[1]
        and q.shape[1] % _LANES == 0
        and spec.q_positions is None
        and spec.k_positions is None
    )


def splash_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    spec: MaskSpec,
    softcap: float | None,
) -> Float[Array, "B T N H"]:
    """Attention of queries that are already scaled."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    T, N, shared = q.shape[1], q.shape[2], k.shape[2] == 1
    one: Any
    if spec.window is None:
        one = splash.CausalMask((T, T))
    else:
        one = splash.LocalMask((T, T), (spec.window - 1, 0), 0)
    block = next(size for size in _BLOCKS if T % size == 0)
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    make = splash.make_splash_mqa if shared else splash.make_splash_mha
    kernel = make(
        splash.MultiHeadMask([one] * N),
        block_sizes=sizes,
        attn_logits_soft_cap=softcap,
        head_shards=1,
        q_seq_shards=1,
        interpret=not on_tpu(),
    )
    ids = spec.q_segment_ids
    segments = None if ids is None else splash.SegmentIds(q=ids, kv=ids)
    heads_first = [jnp.moveaxis(x, 2, 1) for x in (q, k, v)]
    if shared:
        heads_first[1:] = [x[:, 0] for x in heads_first[1:]]
    return jnp.moveaxis(jax.vmap(kernel)(*heads_first, segments), 1, 2)
