"""The vocabulary head: logits, softmax and cross-entropy without ever holding [tokens, V].

One identity covers hard cross-entropy, sparse soft targets, their mixture and z-loss. For a token
with logits z, target ids k_1..k_M and weights w_1..w_M (W = sum of w, lse = log sum exp z):

    loss = W * lse - sum_m w_m z[k_m] + z_loss * W * lse^2
    dz   = W * (1 + 2 * z_loss * lse) * softmax(z) - sum_m w_m onehot(k_m)

The gradient needs nothing but the chunk's own logits, so it is computed in the forward pass, chunk
by chunk, and the backward pass only scales it: three matmuls of the head instead of the four of a
rematerialised one. Hard cross-entropy is M = 1 with weight 1; a target sampled N times from a
teacher has weights count / N (Sparse Logit Sampling, arXiv 2503.16870); z-loss is from PaLM
(arXiv 2204.02311, section 5).

Where the vocabulary is split over devices, each holds the logits of its own ids; maximum, sum of
exponentials and target logits are joined (Shoeybi et al. 2019, section 3), and the rest is local.
"""

import functools
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from gemma_jax.errors import UserError
from gemma_jax.ops.float8 import E4M3, Scaled, scaled_whole
from gemma_jax.ops.hardware import on_hopper
from gemma_jax.ops.table import own_ids, table_parts
from gemma_jax.ops.vocab_softmax import Factors, VocabStats, by_kernel, by_logits, float8_factors

HeadBackend = Literal["auto", "xla", "fused"]
LogitsDtype = Literal["compute", "float8_e4m3fn"]

_CHUNK_LOGITS = 2**28  # 1 GiB of float32
_FUSED_LOGITS = 2**30  # 2 GiB of bfloat16
_CHUNK_TOKENS = 4096  # larger chunks no longer make the matmuls faster
_ROWS = 256  # a chunk of the fused kernel is a multiple of this


class _Settings(NamedTuple):
    z_loss: float
    softcap: float | None
    chunk_tokens: int | None
    backend: HeadBackend
    logits_dtype: LogitsDtype


def default_chunk_tokens(vocab_size: int) -> int:
    """Of a chunk by way of the logits."""
    return max(1, min(_CHUNK_TOKENS, _CHUNK_LOGITS // vocab_size))


def vocab_loss(
    hidden: Float[Array, "*n D"],
    embedding: Float[Array, "V D"],
    target_ids: Int[Array, "*n M"],
    target_weights: Float[Array, "*n M"],
    *,
    z_loss: float = 0.0,
    softcap: float | None = None,
    chunk_tokens: int | None = None,
    backend: HeadBackend = "auto",
    logits_dtype: LogitsDtype = "compute",
) -> tuple[Float[Array, ""], VocabStats]:
    """The summed loss in nats (see the module's docstring), and per-token statistics.

    Differentiable in `hidden` and `embedding`; `target_weights` are constants. Ids may repeat; an
    unused slot has weight 0. Matmuls run in `hidden.dtype` and accumulate in float32; the gradient
    of `embedding` is float32. Memory beyond the inputs and gradients is one chunk of logits,
    `chunk_tokens` x V (by default 1 GiB of float32; of the fused kernel 2 GiB of bfloat16).
    `softcap` is Gemma 2's final softcap.

    `backend` "fused" takes the kernel of `vocab_kernel.py`, "xla" goes by way of the logits, "auto"
    takes the kernel on Hopper GPUs where it can do the work. Raises UserError where a kernel that
    was asked for cannot.

    With `logits_dtype` "float8_e4m3fn" the matmul of the logits alone takes operands rounded to
    that (`float8.py`): a scale a token, one for the table. Loss and statistics are those of the
    rounded operands. The gradients' matmuls stay in `hidden.dtype`, since eight bits would lose the
    small ones of their exponentials, and multiply these with the operands as they were given: the
    gradient takes rounding for the identity (straight-through, Bengio et al., arXiv 1308.3432).
    Meant for GPUs that multiply such numbers (Ada, Hopper and later); others compute the same.

    With a layout active (`gemma_jax.sharding`), the leading dimension is split over the batch
    axes, each device works on its own tokens, and on its own part of the vocabulary where the rules
    split that; chunks are of a device. The gradient of `embedding` lies where `embedding` does.
    """
    settings = _Settings(float(z_loss), softcap, chunk_tokens, backend, logits_dtype)
    weights = jax.lax.stop_gradient(target_weights).astype(jnp.float32)
    with jax.named_scope("head"):
        return _vocab_loss(settings, hidden, embedding, target_ids, weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _vocab_loss(
    settings: _Settings, hidden: Array, embedding: Array, ids: Array, weights: Array
) -> tuple[Array, VocabStats]:
    loss, stats, _ = _sharded(settings, False, hidden, embedding, ids, weights)
    return loss, stats


def _forward(
    settings: _Settings, hidden: Array, embedding: Array, ids: Array, weights: Array
) -> tuple[tuple[Array, VocabStats], tuple[Array, Array]]:
    loss, stats, gradients = _sharded(settings, True, hidden, embedding, ids, weights)
    assert gradients is not None
    d_hidden, d_embedding = gradients
    return (loss, stats), (d_hidden, d_embedding.astype(embedding.dtype))


def _backward(
    settings: _Settings, gradients: tuple[Array, Array], cotangents: tuple[Array, VocabStats]
) -> tuple[Array, Array, None, None]:
    scale = cotangents[0]
    d_hidden, d_embedding = gradients
    return (
        d_hidden * scale.astype(d_hidden.dtype),
        d_embedding * scale.astype(d_embedding.dtype),
        None,
        None,
    )


_vocab_loss.defvjp(_forward, _backward)

type _Result = tuple[Array, VocabStats, tuple[Array, Array] | None]


def _sharded(
    settings: _Settings, with_gradient: bool, hidden: Array, embedding: Array, ids: Array, w: Array
) -> _Result:
    """Runs `_scan` on each device's own tokens. Left to itself, GSPMD would gather all tokens on
    every device, because the scan walks along the dimension that is split."""
    parts = table_parts(embedding.shape, hidden.shape[0])
    if parts is None:
        table = embedding.astype(hidden.dtype)
        return _scan(settings, with_gradient, None, hidden, table, ids, w)

    def local(hidden: Array, embedding: Array, ids: Array, w: Array) -> _Result:
        table = parts.gather(embedding.astype(hidden.dtype))
        loss, stats, gradients = _scan(
            settings, with_gradient, parts.vocab_axis, hidden, table, ids, w
        )
        if parts.row_axes:
            loss = jax.lax.psum(loss, parts.row_axes)
        if gradients is not None:
            d_hidden, d_table = gradients
            if parts.vocab_axis is not None:
                d_hidden = jax.lax.psum(d_hidden, parts.vocab_axis)
            gradients = d_hidden, parts.scatter(d_table)
        return loss, stats, gradients

    rows = parts.rows
    return jax.shard_map(
        local,
        mesh=parts.mesh,
        in_specs=(rows, parts.table, rows, rows),
        out_specs=(
            PartitionSpec(),
            rows,  # of all statistics
            (rows, parts.table) if with_gradient else None,
        ),
        check_vma=False,
    )(hidden, embedding, ids, w)


def _scan(
    settings: _Settings,
    with_gradient: bool,
    axis: str | None,
    hidden: Array,
    table: Array,
    ids: Array,
    w: Array,
) -> _Result:
    """Loss, statistics and gradients of this device's tokens; `table` holds its part of the
    vocabulary, which is split over the mesh axis `axis`, or all of it."""
    shape, D, M = hidden.shape[:-1], hidden.shape[-1], ids.shape[-1]
    n = math.prod(shape)
    chunk, fused = _chunk_size(settings, n, table)
    count = math.ceil(n / chunk)

    def chunks(x: Array) -> Array:
        x = jnp.pad(x.reshape(n, x.shape[-1]), ((0, count * chunk - n), (0, 0)))
        return x.reshape(count, chunk, x.shape[-1])

    table8 = scaled_whole(table, axis) if settings.logits_dtype != "compute" else None
    one = functools.partial(_chunk, settings, with_gradient, fused, axis, table, table8)

    def step(carry: tuple[Array, Array | None], x: tuple[Array, Array, Array]) -> tuple:
        loss, stats, gradients = one(*x)
        total, d_table = carry
        if gradients is None or d_table is None:
            return (total + loss, None), (stats, None)
        return (total + loss, d_table + gradients[1]), (stats, gradients[0])

    zero_table = jnp.zeros(table.shape, jnp.float32) if with_gradient else None
    inputs = (chunks(hidden), chunks(ids), chunks(w))
    stats: VocabStats
    d_hidden: Array | None
    (loss, d_table), (stats, d_hidden) = jax.lax.scan(
        step, (jnp.zeros((), jnp.float32), zero_table), inputs
    )

    def whole(x: Array, *tail: int) -> Array:
        return x.reshape(count * chunk, *tail)[:n].reshape(*shape, *tail)

    stats = VocabStats(whole(stats.lse), whole(stats.max_logit), whole(stats.target_logits, M))
    if d_hidden is None or d_table is None:
        return loss, stats, None
    return loss, stats, (whole(d_hidden, D), d_table)


def _chunk_size(settings: _Settings, n: int, table: Array) -> tuple[int, bool]:
    """Tokens of a chunk, and whether the fused kernel takes them."""
    V = table.shape[0]
    asked = settings.backend == "fused"
    fused = asked or (settings.backend == "auto" and n >= _ROWS and on_hopper())
    if fused and not _fits(settings, table):
        if asked:
            raise UserError(
                f"head_backend='fused' has no kernel for a {table.dtype} table {table.shape}, "
                f"final_softcap={settings.softcap} and head_logits_dtype="
                f"'{settings.logits_dtype}'; choose 'auto'."
            )
        fused = False
    most = max(1, _FUSED_LOGITS // V) if fused else default_chunk_tokens(V)
    chunk = min(settings.chunk_tokens or most, max(n, 1))
    return math.ceil(chunk / _ROWS) * _ROWS if fused else chunk, fused


def _fits(settings: _Settings, table: Array) -> bool:
    from gemma_jax.ops import vocab_kernel  # its imports take a second that others need not spend

    if settings.softcap is not None or table.dtype != jnp.bfloat16:
        return False
    dtype = table.dtype if settings.logits_dtype == "compute" else E4M3
    return vocab_kernel.fits(_ROWS, table.shape, dtype)


def _chunk(
    settings: _Settings,
    with_gradient: bool,
    fused: bool,
    axis: str | None,
    table: Array,
    table8: Scaled | None,
    hidden: Array,
    ids: Array,
    w: Array,
) -> _Result:
    places, here = own_ids(ids, table.shape[0], axis)
    factors = float8_factors(hidden, table8) if table8 else Factors(hidden, table, None)
    if fused:
        s = by_kernel(axis, factors, places, here)
    else:
        s = by_logits(settings.softcap, axis, factors, hidden.dtype, places, here)
    lse, stats = s.stats.lse, s.stats
    total = w.sum(axis=-1)
    loss = (total * lse * (1 + settings.z_loss * lse)).sum() - (w * stats.target_logits).sum()
    if not with_gradient:
        return loss, stats, None

    # dz = scale * (p - targets): the scale of a token goes to the small factors of both matmuls,
    # and the targets are set into p, computed anew in float32 where p is rounded.
    factor = total * (1 + 2 * settings.z_loss * lse)
    scale = (factor / s.sum)[:, None]
    same = ids[:, :, None] == ids[:, None, :]  # an id may be given in several slots
    weight = jnp.where(same, w[:, None, :], 0).sum(axis=-1)
    unscale = jnp.where(factor == 0, 0, s.sum / jnp.where(factor == 0, 1, factor))
    at_targets = jnp.exp(stats.target_logits - s.shift[:, None]) - weight * unscale[:, None]
    if settings.softcap is not None:
        at_targets *= 1 - jnp.square(stats.target_logits / settings.softcap)
    rows = jnp.arange(s.p.shape[0], dtype=ids.dtype)[:, None]
    p = s.p.at[rows, places].set(at_targets.astype(s.p.dtype), mode="drop")
    d_hidden = jnp.einsum("nV,VD->nD", p, table, preferred_element_type=jnp.float32) * scale
    scaled = (hidden.astype(jnp.float32) * scale).astype(hidden.dtype)
    d_table = jnp.einsum("nV,nD->VD", p, scaled, preferred_element_type=jnp.float32)
    return loss, stats, (d_hidden.astype(hidden.dtype), d_table)


def dense_vocab_loss(
    hidden: Float[Array, "*n D"],
    embedding: Float[Array, "V D"],
    target_ids: Int[Array, "*n M"],
    target_weights: Float[Array, "*n M"],
    *,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> Float[Array, ""]:
    """The oracle: the same loss with all logits at once and JAX's own gradient."""
    z = jnp.einsum("...D,VD->...V", hidden, embedding)
    if softcap is not None:
        z = softcap * jnp.tanh(z / softcap)
    lse = jax.nn.logsumexp(z, axis=-1)
    total = target_weights.sum(axis=-1)
    picked = (target_weights * jnp.take_along_axis(z, target_ids, axis=-1)).sum(axis=-1)
    return (total * lse - picked + z_loss * total * jnp.square(lse)).sum()
