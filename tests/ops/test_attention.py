"""Every backend against a float64 loop over queries, values and gradients, at each window edge."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_jax.ops import attention as attention_module
from gemma_jax.ops.attention import attention
from gemma_jax.ops.masks import MaskSpec

B, N, K, H = 2, 4, 2, 8


def oracle(q, k, v, *, window, segments, softcap):
    """float64, one query at a time, over the keys that it sees and no others."""
    T = q.shape[1]
    out = np.zeros(q.shape)
    for b in range(B):
        for n in range(N):
            for t in range(T):
                first = 0 if window is None else max(0, t - window + 1)
                seen = [s for s in range(first, t + 1) if segments[b, s] == segments[b, t]]
                scores = k[b, seen, n * K // N] @ q[b, t, n]
                if softcap is not None:
                    scores = softcap * np.tanh(scores / softcap)
                weights = np.exp(scores - scores.max())
                out[b, t, n] = weights / weights.sum() @ v[b, seen, n * K // N]
    return out


def make_inputs(T, packed, seed=0):
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((B, T, heads, H)) for heads in (N, K, K))
    segments = np.ones((B, T), np.int32)
    if packed:
        segments = np.sort(rng.integers(1, 5, (B, T)), axis=1).astype(np.int32)
        segments[:, -3:] = 0  # padding
    return q, k, v, segments


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of a few tokens, so that tiny sequences cross many of their edges."""
    monkeypatch.setattr(attention_module, "_MIN_BLOCK", 4)
    monkeypatch.setattr(attention_module, "_DENSE_UP_TO", 8)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("window", [None, 1, 4, 5, 7, 29, 30, 31, 64])
@pytest.mark.parametrize("backend", ["reference", "banded"])
def test_values(backend, window, packed):
    T = 30
    q, k, v, segments = make_inputs(T, packed)
    expected = oracle(q, k, v, window=window, segments=segments, softcap=None)
    ids = jnp.asarray(segments)
    spec = MaskSpec(window=window, q_segment_ids=ids, k_segment_ids=ids)
    single = [jnp.asarray(x, jnp.float32) for x in (q, k, v)]
    run = jax.jit(functools.partial(attention, spec=spec, backend=backend))
    got = run(*single)
    np.testing.assert_allclose(got, expected, atol=3e-6)  # float32 rounding of 30 terms
    half = run(*(x.astype(jnp.bfloat16) for x in single))
    np.testing.assert_allclose(half.astype(jnp.float32), expected, atol=0.06)  # 8 bits of mantissa


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("window", [None, 5])
def test_what_cudnn_leaves_to_a_loop_over_queries(window):
    q, k, v, segments = make_inputs(30, True)
    segments[0, 4] = segments[0, 20]  # a document in two pieces
    expected = oracle(q, k, v, window=window, segments=segments, softcap=None)
    ids = jnp.asarray(segments)
    spec = MaskSpec(window=window, q_segment_ids=ids, k_segment_ids=ids)
    arrays = (jnp.asarray(x, jnp.float32) for x in (q, k, v))
    got = jax.jit(attention_module._query_blocks)(*arrays, spec)
    np.testing.assert_allclose(got, expected, atol=3e-6)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("window", [None, 5, 12])
def test_gradients_of_banded_equal_those_of_reference(window, packed):
    q, k, v, segments = make_inputs(30, packed)
    ids = jnp.asarray(segments)
    spec = MaskSpec(window=window, q_segment_ids=ids, k_segment_ids=ids)
    cotangent = jnp.asarray(np.random.default_rng(1).standard_normal(q.shape), jnp.float32)

    def loss(backend, q, k, v):
        return (attention(q, k, v, spec, softcap=3.0, backend=backend) * cotangent).sum()

    single = [jnp.asarray(x, jnp.float32) for x in (q, k, v)]
    got, expected = (
        jax.jit(jax.grad(functools.partial(loss, backend), (0, 1, 2)))(*single)
        for backend in ("banded", "reference")
    )
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_softcap():
    q, k, v, segments = make_inputs(6, packed=False)
    expected = oracle(q, k, v, window=None, segments=segments, softcap=0.5)
    got = attention(*(jnp.asarray(x, jnp.float32) for x in (q, k, v)), MaskSpec(), softcap=0.5)
    np.testing.assert_allclose(got, expected, atol=3e-6)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("window", [None, 5])
def test_no_leak_between_documents(window):
    """Another first document must not move the second by a bit."""
    q, k, v, _ = make_inputs(30, packed=False)
    segments = jnp.asarray(np.repeat([[1] * 11 + [2] * 19], B, axis=0), jnp.int32)
    spec = MaskSpec(window=window, q_segment_ids=segments, k_segment_ids=segments)
    outputs = []
    for shift in (0.0, 5.0):
        moved = [jnp.asarray(x, jnp.float32).at[:, :11].add(shift) for x in (q, k, v)]
        outputs.append(attention(*moved, spec, backend="banded"))
    np.testing.assert_array_equal(outputs[0][:, 11:], outputs[1][:, 11:])
    assert not np.array_equal(outputs[0][:, :11], outputs[1][:, :11])


def test_banded_refuses_a_cache():
    q, k, v, _ = make_inputs(6, packed=False)
    single = [jnp.asarray(x, jnp.float32) for x in (q[:, :1], k, v)]
    with pytest.raises(ValueError, match="in order"):
        attention(*single, MaskSpec(window=4), backend="banded")


@pytest.mark.parametrize("num_kv_heads", [1, 2])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("window", [None, 1, 127, 128, 129, 300])
def test_splash_interpreted(window, packed, num_kv_heads):
    q, k, v, segments = make_inputs(256, packed)
    k, v = k[:, :, :num_kv_heads], v[:, :, :num_kv_heads]
    ids = jnp.asarray(segments) if packed else None
    spec = MaskSpec(window=window, q_segment_ids=ids, k_segment_ids=ids)
    cotangent = jnp.asarray(np.random.default_rng(1).standard_normal(q.shape), jnp.float32)
    arrays = [jnp.asarray(x, jnp.float32) for x in (q, k, v)]

    def run(backend):
        out, pull = jax.vjp(lambda *x: attention(*x, spec, backend=backend), *arrays)
        return out, *pull(cotangent)

    for ours, expected in zip(run("splash"), run("reference"), strict=True):
        np.testing.assert_allclose(ours, expected, atol=2e-5)


def test_splash_refuses_lengths_that_it_has_no_blocks_for():
    x = jnp.zeros((1, 100, 1, 8))
    with pytest.raises(ValueError, match="multiple of 128"):
        attention(x, x, x, MaskSpec(), backend="splash")
