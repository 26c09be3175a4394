"""Kernels that only a GPU runs, against float32 arithmetic of the portable paths on the same GPU.

python -m pytest -m gpu tests/ops/test_gpu.py
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from float8_numpy import rounded

from gemma_jax.distill import mass_tree
from gemma_jax.distill.sampling import sample_targets, token_keys
from gemma_jax.ops.attention import attention
from gemma_jax.ops.hardware import on_hopper
from gemma_jax.ops.masks import MaskSpec
from gemma_jax.ops.vocab_loss import vocab_loss
from gemma_jax.ops.vocab_softmax import VocabStats

pytestmark = pytest.mark.gpu

B, N = 2, 4
WINDOWS = (None, 1, 100, 511, 512, 513, 2000)


def segment_ids(length, documents, padding=0, seed=0):
    """[B, T]: `documents` runs of random lengths, then padding."""
    rng = np.random.default_rng(seed)
    ids, used = np.zeros((B, length), np.int32), length - padding
    for row in ids:
        cuts = np.sort(rng.choice(np.arange(1, used), documents - 1, replace=False))
        row[:used] = 1 + np.searchsorted(cuts, np.arange(used), side="right")
    return jnp.asarray(ids)


def make_inputs(length, num_kv_heads, head_dim, seed=0):
    rng = np.random.default_rng(seed)
    scales = {"q": 3 * head_dim**-0.5, "k": 1.0, "v": 1.0, "gradient": 1.0}
    heads = {"q": N, "k": num_kv_heads, "v": num_kv_heads, "gradient": N}
    return [
        jnp.asarray(scales[x] * rng.standard_normal((B, length, heads[x], head_dim)), jnp.bfloat16)
        for x in scales
    ]


@functools.partial(jax.jit, static_argnames=("window", "backend", "dtype", "promised"))
def run(q, k, v, gradient, ids, *, window, backend, dtype, promised=None):
    """(output, gradients of q, k, v)."""
    spec = MaskSpec(window=window, most_documents=promised, q_segment_ids=ids, k_segment_ids=ids)
    inputs = (x.astype(dtype) for x in (q, k, v))
    with jax.default_matmul_precision("highest"):
        out, pull = jax.vjp(lambda q, k, v: attention(q, k, v, spec, backend=backend), *inputs)
        return out, *pull(gradient.astype(out.dtype))


def check(arrays, ids, window, promised=None):
    exact = run(*arrays, ids, window=window, backend="reference", dtype=jnp.float32)
    settings = {"window": window, "backend": "cudnn", "dtype": jnp.bfloat16}
    got = run(*arrays, ids, **settings, promised=promised)
    # Of one key alone the gradients of q and k are exactly 0, and rounding is not.
    least = 0.1 * jnp.linalg.norm(arrays[3].astype(jnp.float32).ravel()) if window == 1 else 0
    for ours, expected in zip(got, exact, strict=True):
        error = jnp.linalg.norm((ours.astype(jnp.float32) - expected).ravel())
        size = jnp.maximum(jnp.linalg.norm(expected.ravel()), least)
        assert error < 6e-3 * size  # operands of 8 bits


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("documents", [None, 1, 6])
def test_cudnn(window, documents):
    ids = None if documents is None else segment_ids(1024, documents, padding=30)
    check(make_inputs(1024, 1, 256), ids, window)


@pytest.mark.parametrize("window", [None, 100, 512])
@pytest.mark.parametrize(("documents", "promised"), [(1, 1), (6, 7), (6, 20), (1, 3)])
def test_cudnn_with_a_promise(window, documents, promised):
    """Padding counts as a document."""
    ids = segment_ids(1024, documents, padding=30 if promised > documents else 0)
    check(make_inputs(1024, 1, 256), ids, window, promised)


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize(
    ("length", "num_kv_heads", "head_dim", "promised"),
    [(777, 2, 64, None), (777, 2, 64, 8), (777, 4, 32, 1), (512, 4, 128, None), (64, 1, 256, None)],
)
def test_cudnn_of_other_shapes(length, num_kv_heads, head_dim, promised, window):
    """Odd lengths among them, which JAX does not hand to cuDNN."""
    ids = None if promised == 1 else segment_ids(length, 7, padding=5)
    check(make_inputs(length, num_kv_heads, head_dim), ids, window, promised)


@pytest.mark.parametrize("window", [None, 100])
def test_cudnn_where_a_loop_takes_over(window):
    many = segment_ids(640, 200)
    check(make_inputs(640, 1, 256), many, window)
    in_pieces = jnp.where(jnp.arange(640) % 200 < 100, 1, 2)[None].repeat(B, axis=0)
    check(make_inputs(640, 1, 256), in_pieces.astype(jnp.int32), window)


@pytest.mark.parametrize("window", [None, 100])
def test_no_document_sees_another(window):
    ids = segment_ids(1024, 5)
    arrays = make_inputs(1024, 1, 256)
    third = (ids == 3)[..., None, None]
    moved = [jnp.where(third, -x, x) for x in arrays]
    settings = {"window": window, "backend": "cudnn", "dtype": jnp.bfloat16}
    for before, after in zip(
        run(*arrays, ids, **settings), run(*moved, ids, **settings), strict=True
    ):
        np.testing.assert_array_equal(jnp.where(third, 0, before), jnp.where(third, 0, after))


@pytest.mark.parametrize("far", [False, True])
def test_draws_of_a_teacher(far, monkeypatch):
    """Its logits are read once here, and several times elsewhere."""
    rng = np.random.default_rng(1)
    n, V = 64, 262_144
    logits = jnp.asarray(4 * rng.standard_normal((n, V)), jnp.float32)
    labels = (logits.argmin(axis=1) if far else logits.argmax(axis=1)).astype(jnp.int32)
    logits = logits.at[:, 7].add(80.0 if far else 0.0)
    keys = token_keys(jax.random.key(0), jnp.zeros(1, jnp.int32), n)[0]

    def draw(on_gpu):
        monkeypatch.setattr(mass_tree, "on_gpu", lambda: on_gpu)
        run = jax.jit(lambda *given: sample_targets(*given, draws=64, method="systematic"))
        return run(logits, labels, keys)

    ours, usual = draw(True), draw(False)
    np.testing.assert_allclose(ours.entropy, usual.entropy, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(ours.label_logprob, usual.label_logprob, rtol=1e-6, atol=1e-5)
    assert np.mean(np.asarray(ours.ids) != np.asarray(usual.ids)) < 0.02
    np.testing.assert_array_equal(ours.counts.sum(axis=1), 64)


@pytest.mark.parametrize("targets", [1, 16])
@pytest.mark.parametrize("scale", [0.05, 3.0])  # the second: targets 60 nats and more from the top
def test_fused_head(targets, scale):
    if not on_hopper():
        pytest.skip("the kernel is for Hopper GPUs")
    rng = np.random.default_rng(0)
    n, V, D = 700, 4096, 640
    hidden = jnp.asarray(rng.standard_normal((n, D)), jnp.bfloat16)
    table = jnp.asarray(scale * rng.standard_normal((V, D)), jnp.bfloat16)
    ids = jnp.asarray(rng.integers(0, V, (n, targets)), jnp.int32)
    weights = jnp.asarray(rng.random((n, targets)), jnp.float32)

    def loss(backend, dtype, hidden, table):
        return vocab_loss(hidden.astype(dtype), table.astype(dtype), ids, weights, backend=backend)

    def both(backend, dtype):
        f = jax.value_and_grad(functools.partial(loss, backend, dtype), (0, 1), has_aux=True)
        with jax.default_matmul_precision("highest"):
            return jax.jit(f)(hidden, table)

    (exact, stats), exact_gradients = both("xla", jnp.float32)
    (ours, own_stats), gradients = both("fused", jnp.bfloat16)
    np.testing.assert_allclose(ours, exact, rtol=1e-5)
    for a, b in zip(own_stats, stats, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-3)
    for a, b in zip(gradients, exact_gradients, strict=True):
        a, b = (np.asarray(x, np.float64) for x in (a, b))
        assert np.linalg.norm(a - b) < 8e-3 * np.linalg.norm(b)


@pytest.mark.parametrize("targets", [1, 16])
@pytest.mark.parametrize("backend", ["xla", "fused"])
def test_float8_logits(backend, targets):
    """Operands lie within 3 % of small whole numbers, to which e4m3 rounds them. Of those a tensor
    core's sum is exact, however few bits it has: the loss must be that of the whole numbers, and
    is another without rounding."""
    if backend == "fused" and not on_hopper():
        pytest.skip("the kernel is for Hopper GPUs")
    rng = np.random.default_rng(0)
    n, V, D = 700, 4096, 640

    def numbers(rows, size):  # of all signs, 2^-6 times them in the table
        whole = rng.integers(-3, 4, (rows, D))
        return jnp.asarray(size * whole * rng.uniform(0.98, 1.03, (rows, D)), jnp.bfloat16)

    hidden, table = numbers(n, 1.0), numbers(V, 2.0**-6)
    near = [np.asarray(x, np.float64) for x in (hidden, table)]
    factors = rounded(near[0], -1), rounded(near[1], None)
    np.testing.assert_array_equal(factors[0], np.round(near[0]))
    np.testing.assert_array_equal(factors[1], np.round(64 * near[1]) / 64)
    ids = jnp.asarray(rng.integers(0, V, (n, targets)), jnp.int32)
    weights = jnp.asarray(rng.random((n, targets)), jnp.float32)

    def logits_loss(z):
        lse, total = jax.nn.logsumexp(z, axis=-1), weights.sum(axis=-1)
        picked = jnp.take_along_axis(z, ids, axis=-1)
        loss = (total * lse - (weights * picked).sum(axis=-1)).sum()
        return loss, VocabStats(lse, z.max(axis=-1), picked)

    z = jnp.asarray(factors[0] @ factors[1].T, jnp.float32)  # exact
    (exact, stats), dz = jax.value_and_grad(logits_loss, has_aux=True)(z)
    dz = np.asarray(dz, np.float64)

    def loss(hidden, table):
        return vocab_loss(
            hidden, table, ids, weights, backend=backend, logits_dtype="float8_e4m3fn"
        )

    run = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    (ours, own_stats), gradients = run(hidden, table)
    # The kernel's target logits are read back from exponentials of bfloat16.
    np.testing.assert_allclose(ours, exact, rtol=1e-5 if backend == "xla" else 1e-4)
    np.testing.assert_allclose(own_stats.lse, stats.lse, rtol=1e-5)
    np.testing.assert_allclose(own_stats.max_logit, stats.max_logit, atol=1e-5)
    atol = 1e-5 if backend == "xla" else 2**-8
    np.testing.assert_allclose(own_stats.target_logits, stats.target_logits, atol=atol)
    for a, b in zip(gradients, (dz @ near[1], dz.T @ near[0]), strict=True):
        a = np.asarray(a, np.float64)
        assert np.linalg.norm(a - b) < 8e-3 * np.linalg.norm(b)
