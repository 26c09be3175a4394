"""The chunked head against the dense loss in float64: loss, statistics and both gradients."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from float8_numpy import rounded
from programs import collectives, shapes

from gemma_jax.ops.vocab_loss import dense_vocab_loss, vocab_loss
from gemma_jax.sharding import MeshConfig, make_layout

N, D, V, M = 22, 12, 40, 5
FLOAT8 = "float8_e4m3fn"


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


def float64_oracle(hidden, embedding, ids, weights, z_loss, softcap, factors=None):
    """Loss and gradients by hand in NumPy, in float64; the logits are the product of `factors`, the
    gradients' matmuls take what was given."""
    factors = factors or (hidden, embedding)
    raw = factors[0] @ factors[1].T
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


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("chunk", [7, 22])
def test_float8_logits_against_float64_on_rounded_operands(chunk, z_loss, softcap):
    hidden, embedding, ids, weights = inputs()
    hidden *= np.exp2(np.arange(N) % 5 - 3)[:, None]  # tokens of several scales
    embedding *= np.exp2(-(np.arange(V) % 16))[:, None]  # rows that share one
    hidden, embedding = (np.float64(np.float32(x)) for x in (hidden, embedding))
    factors = rounded(hidden, -1), rounded(embedding, None)
    loss64, d_hidden64, d_embedding64, lse, picked, top = float64_oracle(
        hidden, embedding, ids, weights, z_loss, softcap, factors
    )

    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def run(hidden, embedding):
        return vocab_loss(
            hidden,
            embedding,
            jnp.asarray(ids),
            jnp.float32(weights),
            z_loss=z_loss,
            softcap=softcap,
            chunk_tokens=chunk,
            logits_dtype=FLOAT8,
        )

    (loss, stats), (d_hidden, d_embedding) = run(jnp.float32(hidden), jnp.float32(embedding))
    np.testing.assert_allclose(loss, loss64, rtol=2e-6)
    np.testing.assert_allclose(stats.lse, lse, rtol=2e-6)
    np.testing.assert_allclose(stats.target_logits, picked, rtol=2e-6, atol=1e-5)
    np.testing.assert_allclose(stats.max_logit, top, rtol=2e-6)
    np.testing.assert_allclose(d_hidden, d_hidden64, rtol=3e-6, atol=1e-5)
    np.testing.assert_allclose(d_embedding, d_embedding64, rtol=3e-6, atol=2e-5)


def test_the_logits_matmul_alone_is_float8():
    hidden, embedding, ids, weights = inputs()

    def run(hidden, embedding):
        return vocab_loss(
            hidden, embedding, jnp.asarray(ids), jnp.float32(weights), logits_dtype=FLOAT8
        )[0]

    arguments = jnp.bfloat16(hidden), jnp.float32(embedding)
    program = jax.jit(jax.value_and_grad(run, (0, 1))).lower(*arguments).as_text()
    operands = re.findall(r"dot_general .*: \(tensor<\w+x(\w+)>, tensor<\w+x(\w+)>\)", program)
    assert sorted(operands) == [("bf16", "bf16"), ("bf16", "bf16"), ("f8E4M3FN", "f8E4M3FN")]


@pytest.mark.parametrize(
    "mesh",
    [{"data": 2, "tensor": 4}, {"data": 1, "fsdp": 4, "tensor": 2}, {"data": 4, "fsdp": 2}],
    ids=lambda mesh: ",".join(map(str, mesh.values())),
)
def test_float8_on_a_mesh_equals_one_device(mesh):
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.standard_normal((8, 6, D)), jnp.float32)
    # Parts of the table whose largest numbers differ, and numbers that only the whole one's scale
    # takes out of what e4m3 holds with full precision.
    sizes = np.exp2(np.linspace(-15, 1, V))[rng.permutation(V)]
    embedding = jnp.asarray(sizes[:, None] * rng.standard_normal((V, D)), jnp.float32)
    ids = jnp.asarray(rng.integers(0, V, (8, 6, M)), jnp.int32)
    weights = jnp.asarray(rng.random((8, 6, M)), jnp.float32)

    def run(hidden, embedding):
        return vocab_loss(hidden, embedding, ids, weights, chunk_tokens=4, logits_dtype=FLOAT8)

    both = jax.jit(jax.value_and_grad(run, (0, 1), has_aux=True))
    expected = both(hidden, embedding)
    with make_layout(MeshConfig(**mesh)).active():
        got = both(hidden, embedding)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, expected)


def test_gradient_scales_with_the_cotangent():
    hidden, embedding, ids, weights = (jnp.asarray(x) for x in inputs())
    arguments = (jnp.float32(hidden), jnp.float32(embedding), ids, jnp.float32(weights))
    one = jax.grad(lambda h: vocab_loss(h, *arguments[1:])[0])(arguments[0])
    three = jax.grad(lambda h: 3 * vocab_loss(h, *arguments[1:])[0])(arguments[0])
    np.testing.assert_allclose(three, 3 * one, rtol=1e-6)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize(
    "mesh",
    [
        {"data": 4, "fsdp": 2, "rules": "dp"},
        {"data": 4, "fsdp": 2, "rules": "fsdp"},
        {"data": 2, "tensor": 4},
        {"data": 2, "fsdp": 2, "tensor": 2},
        {"data": 1, "fsdp": 4, "tensor": 2},
        {"data": 1, "tensor": 8},
        {"data": 2, "fsdp": 2, "tensor": 2, "rules": "fsdp"},
    ],
    ids=lambda mesh: ",".join(map(str, mesh.values())),
)
def test_a_mesh_equals_one_device_and_gathers_parameters_alone(mesh, softcap):
    """Tokens split, the vocabulary split, both; a table whose width is split is gathered."""
    rng = np.random.default_rng(0)
    B, T = 8, 6
    hidden = jnp.asarray(rng.standard_normal((B, T, D)), jnp.float32)
    embedding = jnp.asarray(rng.standard_normal((V, D)), jnp.float32)
    ids = jnp.asarray(rng.integers(0, V, (B, T, M)), jnp.int32)
    weights = jnp.asarray(rng.random((B, T, M)), jnp.float32)

    def run(hidden, embedding, ids, weights):
        return jax.value_and_grad(
            lambda h, e: vocab_loss(
                h, e, ids, weights, z_loss=0.1, softcap=softcap, chunk_tokens=4
            ),
            (0, 1),
            has_aux=True,
        )(hidden, embedding)

    expected = jax.jit(run)(hidden, embedding, ids, weights)
    layout = make_layout(MeshConfig(**mesh))
    rows = layout.batch_sharding()
    table = jax.sharding.NamedSharding(layout.mesh, layout.spec(("vocab", "embed"), (V, D)))
    with layout.active():
        arguments = jax.device_put((hidden, embedding, ids, weights), (rows, table, rows, rows))
        compiled = jax.jit(run).lower(*arguments).compile()
        got = compiled(*arguments)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, expected)
    assert got[1][1].sharding.is_equivalent_to(table, 2)

    program = compiled.as_text()
    found = collectives(program)
    split = layout.rules.vocab and layout.mesh.shape["tensor"] > 1
    used = (V // layout.mesh.shape["tensor"] if split else V, D)
    stored = layout.rules.embed and layout.mesh.shape["fsdp"] > 1
    assert {c.shape for c in found if c.kind == "all-gather"} == ({used} if stored else set())
    assert any(c.kind == "reduce-scatter" for c in found) == bool(stored)
    assert not [c for c in found if c.kind in ("all-to-all", "collective-permute")]
    own = B // layout.batch_size_multiple * T  # a device's tokens: logits of all at once are none
    assert not {(own, V), (own, used[0]), (B * T, V), (B * T, used[0])} & shapes(program)


def test_a_batch_and_a_vocabulary_that_do_not_divide_stay_whole():
    hidden, embedding, ids, weights = inputs()
    arguments = (
        jnp.float32(hidden[:3]),
        jnp.float32(embedding[:39]),
        jnp.asarray(ids[:3] % 39),
        jnp.float32(weights[:3]),
    )
    run = jax.jit(jax.value_and_grad(lambda *x: vocab_loss(*x)[0], (0, 1)))
    expected = run(*arguments)
    with make_layout(MeshConfig(data=2, fsdp=2, tensor=2)).active():
        got = run(*arguments)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, expected)
