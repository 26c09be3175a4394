"""The chunked head against the dense loss in float64: loss, statistics and both gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_jax.ops.vocab_loss import dense_vocab_loss, vocab_loss
from gemma_jax.sharding import MeshConfig, make_layout

N, D, V, M = 22, 12, 40, 5


def inputs(seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    hidden = scale * rng.standard_normal((N, D))
    embedding = rng.standard_normal((V, D))
    ids = rng.integers(0, V, (N, M)).astype(np.int32)
    ids[3] = ids[3, 0]  # the same id in every slot
    weights = rng.random((N, M))
    weights[5] = 0  # a token that does not count
    weights[6, 1:] = 0
    return hidden, embedding, ids, weights


def float64_oracle(hidden, embedding, ids, weights, z_loss, softcap):
    """Loss and gradients by hand in NumPy, in float64."""
    raw = hidden @ embedding.T
    z = raw if softcap is None else softcap * np.tanh(raw / softcap)
    top = z.max(-1)
    lse = top + np.log(np.exp(z - top[:, None]).sum(-1))
    total = weights.sum(-1)
    picked = np.take_along_axis(z, ids, -1)
    loss = (total * lse - (weights * picked).sum(-1) + z_loss * total * lse**2).sum()
    dz = (total * (1 + 2 * z_loss * lse))[:, None] * np.exp(z - lse[:, None])
    for n in range(N):
        for m in range(M):
            dz[n, ids[n, m]] -= weights[n, m]
    if softcap is not None:
        dz *= 1 - (z / softcap) ** 2
    return loss, dz @ embedding, dz.T @ hidden, lse, picked, top


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("chunk", [1, 7, 22, 100])
def test_float32_against_float64(chunk, z_loss, softcap):
    arrays = inputs()
    loss64, d_hidden64, d_embedding64, lse, picked, top = float64_oracle(*arrays, z_loss, softcap)
    hidden, embedding, ids, weights = (
        jnp.asarray(x, jnp.int32 if x.dtype == np.int32 else jnp.float32) for x in arrays
    )

    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def run(hidden, embedding):
        return vocab_loss(
            hidden, embedding, ids, weights, z_loss=z_loss, softcap=softcap, chunk_tokens=chunk
        )

    (loss, stats), (d_hidden, d_embedding) = run(hidden, embedding)
    np.testing.assert_allclose(loss, loss64, rtol=2e-6)
    np.testing.assert_allclose(d_hidden, d_hidden64, rtol=3e-6, atol=1e-5)
    np.testing.assert_allclose(d_embedding, d_embedding64, rtol=3e-6, atol=1e-5)
    np.testing.assert_allclose(stats.lse, lse, rtol=2e-6)
    np.testing.assert_allclose(stats.target_logits, picked, atol=1e-5)
    np.testing.assert_allclose(stats.max_logit, top, rtol=2e-6)
    dense = dense_vocab_loss(hidden, embedding, ids, weights, z_loss=z_loss, softcap=softcap)
    np.testing.assert_allclose(dense, loss64, rtol=2e-6)


def test_extreme_logits_stay_finite():
    hidden, embedding, ids, weights = inputs(scale=1e4)
    loss64, d_hidden64, *_ = float64_oracle(hidden, embedding, ids, weights, 0.0, None)
    run = jax.value_and_grad(
        lambda h: vocab_loss(h, jnp.float32(embedding), jnp.asarray(ids), jnp.float32(weights))[0]
    )
    loss, d_hidden = run(jnp.float32(hidden))
    np.testing.assert_allclose(loss, loss64, rtol=1e-5)
    np.testing.assert_allclose(d_hidden, d_hidden64, atol=1e-4)


def test_bfloat16_is_close_and_keeps_its_types():
    hidden, embedding, ids, weights = inputs()
    loss64, d_hidden64, d_embedding64, *_ = float64_oracle(*inputs(), 0.0, None)
    run = jax.value_and_grad(
        lambda h, e: vocab_loss(h, e, jnp.asarray(ids), jnp.float32(weights))[0], (0, 1)
    )
    loss, (d_hidden, d_embedding) = run(jnp.bfloat16(hidden), jnp.float32(embedding))
    assert d_hidden.dtype == jnp.bfloat16
    assert d_embedding.dtype == jnp.float32
    # bfloat16 has 8 bits of mantissa: 0.4 % an operand
    np.testing.assert_allclose(loss, loss64, rtol=1e-2)
    for got, expected in ((d_hidden, d_hidden64), (d_embedding, d_embedding64)):
        error = np.linalg.norm(np.asarray(got, np.float64) - expected)
        assert error < 0.015 * np.linalg.norm(expected)


def test_gradient_scales_with_the_cotangent():
    hidden, embedding, ids, weights = (jnp.asarray(x) for x in inputs())
    arguments = (jnp.float32(hidden), jnp.float32(embedding), ids, jnp.float32(weights))
    one = jax.grad(lambda h: vocab_loss(h, *arguments[1:])[0])(arguments[0])
    three = jax.grad(lambda h: 3 * vocab_loss(h, *arguments[1:])[0])(arguments[0])
    np.testing.assert_allclose(three, 3 * one, rtol=1e-6)


def test_sharded_batch_equals_one_device_and_gathers_no_tokens():
    """The program for 8 devices: no all-gather at all of a hidden state, no [tokens, V]."""
    rng = np.random.default_rng(0)
    B, T = 8, 6
    hidden = jnp.asarray(rng.standard_normal((B, T, D)), jnp.float32)
    embedding = jnp.asarray(rng.standard_normal((V, D)), jnp.float32)
    ids = jnp.asarray(rng.integers(0, V, (B, T, M)), jnp.int32)
    weights = jnp.asarray(rng.random((B, T, M)), jnp.float32)

    def run(hidden, embedding, ids, weights):
        return jax.value_and_grad(
            lambda h, e: vocab_loss(h, e, ids, weights, chunk_tokens=4)[0], (0, 1)
        )(hidden, embedding)

    expected = jax.jit(run)(hidden, embedding, ids, weights)
    layout = make_layout(MeshConfig(data=4, fsdp=2))
    with layout.active():
        rows = [jax.device_put(x, layout.batch_sharding()) for x in (hidden, ids, weights)]
        compiled = jax.jit(run).lower(rows[0], embedding, rows[1], rows[2]).compile()
        got = compiled(rows[0], jax.device_put(embedding, layout.replicated()), *rows[1:])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, expected)
    program = compiled.as_text()
    assert "all-gather" not in program
    assert "all-reduce" in program
    assert f"[{B * T},{V}]" not in program
    assert f"[{T},{V}]" not in program  # a device's own tokens, all at once
