"""Fused attention by cuDNN: bfloat16 or float16 on NVIDIA GPUs, with windows and packed documents.

`jax.nn.dot_product_attention` reaches cuDNN, but knows no documents. cuDNN itself does: it takes
the beginnings and lengths of the documents of a batch ("ragged" tensors), through a module of JAX
that is not public. How many documents a sequence can hold at most is part of the program. Where
nobody promises that (`MaskSpec.most_documents`), the program looks when it runs: sequences that
hold more than `documents_expected`, or one document in several pieces, are given to another backend
by a `cond`, for which the host has to wait.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gemma_jax.ops.masks import MaskSpec

_TOKENS_A_DOCUMENT = 32  # at least, on average over a sequence

_TENSORS = (
    *("query", "key", "value", "bias", "q_seqlen", "kv_seqlen", "q_offsets", "kv_offsets"),
    *("page_table_k", "page_table_v"),
)

type _Run = Callable[[Array, Array, Array, MaskSpec], Array]


def can_do(q: Array, k: Array, spec: MaskSpec, softcap: float | None) -> bool:
    """Whether cuDNN computes exactly this. Keys must be those of the queries, in order."""
    return (
        q.dtype in (jnp.bfloat16, jnp.float16)
        and q.shape[-1] <= 256
        and q.shape[-1] % 8 == 0
        and q.shape[1] == k.shape[1]
        and spec.q_positions is None
        and spec.k_positions is None
        and softcap is None
    )


def cudnn_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    spec: MaskSpec,
    *,
    otherwise: _Run,
) -> Float[Array, "B T N H"]:
    """Attention of queries that are already scaled; `otherwise` takes what has too many documents.

    A token of segment 0 sees those of segment 0, as everywhere.
    """
    T, ids = q.shape[1], spec.q_segment_ids
    if T % 2:  # JAX refuses odd lengths; one token more, of the last document, is seen by none
        q, k, v = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (q, k, v))
        ids = ids if ids is None else jnp.pad(ids, ((0, 0), (0, 1)), mode="edge")
    if ids is None or spec.most_documents == 1:
        window = None if spec.window is None else (spec.window - 1, 0)
        out = jax.nn.dot_product_attention(
            q, k, v, scale=1.0, is_causal=True, local_window_size=window, implementation="cudnn"
        )
    else:
        out = _packed(_How(otherwise, spec.window, spec.most_documents), q, k, v, ids)
    return out[:, :T]


class Documents(NamedTuple):
    """Where the documents of each sequence begin, how long they are (-1: no such document), and
    whether that says all that the segment ids say."""

    starts: Int[Array, "B M+1"]
    lengths: Int[Array, "B M"]
    complete: Bool[Array, ""]


def documents_expected(length: int) -> int:
    """Of a sequence; each that might be there costs a few empty blocks of the kernel's grid."""
    return max(16, length // _TOKENS_A_DOCUMENT)


def documents(ids: Int[Array, "B T"], most: int) -> Documents:
    """Runs of equal segment ids; complete if they are at most `most`, and no id has two."""
    T = ids.shape[1]
    begins, differ = (
        jnp.pad(jnp.diff(x, axis=1) != 0, ((0, 0), (1, 0)), constant_values=True)
        for x in (ids, jnp.sort(ids, axis=1))
    )
    places = jnp.where(begins, jnp.arange(T, dtype=jnp.int32), T)
    ordered = jnp.sort(places, axis=1)[:, : most + 1]
    ordered = jnp.pad(ordered, ((0, 0), (0, max(0, most + 1 - T))), constant_values=T)
    exists = ordered[:, :most] < T
    lengths = jnp.where(exists, ordered[:, 1:] - ordered[:, :-1], -1)
    starts = jnp.where(ordered < T, ordered, -1).at[:, most].set(-1)
    runs = begins.sum(axis=1)
    complete = (runs <= most) & (runs == differ.sum(axis=1))
    return Documents(starts, lengths, complete.all())


class _How(NamedTuple):
    otherwise: _Run
    window: int | None
    promised: int | None  # documents of a sequence at most

    def documents(self, ids: Array) -> Documents:
        return documents(ids, self.promised or documents_expected(ids.shape[1]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _packed(how: _How, q: Array, k: Array, v: Array, ids: Array) -> Array:
    return _forward(how, q, k, v, ids)[0]


def _forward(
    how: _How, q: Array, k: Array, v: Array, ids: Array
) -> tuple[Array, tuple[Array, ...]]:
    found = how.documents(ids)

    def fused(q: Array, k: Array, v: Array) -> tuple[Array, Array]:
        out, residuals = _rule("_dot_product_attention_fwd_rule", how.window, q, k, v, found)
        return out, residuals[-2]  # before the output: the log-sum-exp of each query

    def other(q: Array, k: Array, v: Array) -> tuple[Array, Array]:
        shape = jax.eval_shape(fused, q, k, v)[1]
        return how.otherwise(q, k, v, _spec(how.window, ids)), jnp.zeros(shape.shape, shape.dtype)

    if how.promised is None:
        out, statistic = jax.lax.cond(found.complete, fused, other, q, k, v)
    else:
        out, statistic = fused(q, k, v)
    return out, (q, k, v, ids, out, statistic)


def _backward(
    how: _How, residuals: tuple[Array, ...], gradient: Array
) -> tuple[Array, Array, Array, None]:
    q, k, v, ids, out, statistic = residuals
    found = how.documents(ids)

    def fused(q: Array, k: Array, v: Array, gradient: Array) -> tuple[Array, Array, Array]:
        return _rule(
            "_dot_product_attention_bwd_rule", how.window, q, k, v, found, out, statistic, gradient
        )[:3]

    def other(q: Array, k: Array, v: Array, gradient: Array) -> tuple[Array, Array, Array]:
        spec = _spec(how.window, ids)
        return jax.vjp(lambda q, k, v: how.otherwise(q, k, v, spec), q, k, v)[1](gradient)

    if how.promised is not None:
        return *fused(q, k, v, gradient), None
    return *jax.lax.cond(found.complete, fused, other, q, k, v, gradient), None


_packed.defvjp(_forward, _backward)


def _spec(window: int | None, ids: Array) -> MaskSpec:
    return MaskSpec(window=window, q_segment_ids=ids, k_segment_ids=ids)


def _rule(
    name: str,
    window: int | None,
    q: Array,
    k: Array,
    v: Array,
    found: Documents,
    out: Array | None = None,
    statistic: Array | None = None,
    gradient: Array | None = None,
) -> Any:
    """Calls one of the two halves of cuDNN's attention that JAX's own gradient is made of.

    The arguments go by their names: versions of JAX differ in which there are.
    """
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    empty = jnp.zeros(0, q.dtype)
    given: dict[str, Any] = {
        "query": q,
        "key": k,
        "value": v,
        "bias": empty,
        "q_seqlen": found.lengths,
        "kv_seqlen": found.lengths,
        "q_offsets": found.starts,
        "kv_offsets": found.starts,
        "page_table_k": empty,
        "page_table_v": empty,
        "score_mod_args": (),
        "scale": 1.0,
        "seed": 42,
        "dropout_rate": 0.0,
        "variadic_args": (False, False),
        "mask_type": cudnn.MaskType.PADDING_CAUSAL,
        "layout": cudnn.AttentionLayout.BTNH.value,
        "sliding_window_length": window,
        "score_mod": None,
        "cudnn_version": cudnn.check_cudnn_version(),
        "is_training": True,
        "return_residual": False,
        "grad_output": gradient,
    }
    rule = getattr(cudnn, name)
    names = inspect.signature(rule).parameters
    if "res" in names:
        own = ((),) if "score_mod" in names else ()
        given["res"] = (*(given[one] for one in _TENSORS), *own, statistic, out)
    return rule(**{one: given[one] for one in names})
