"""The fused head, its kernel interpreted on the CPU, against the dense loss in float64."""

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from float8_numpy import rounded

from gemma_jax.errors import UserError
from gemma_jax.ops.float8 import E4M3, scaled_rows, scaled_whole
from gemma_jax.ops.vocab_kernel import Tiles, exp_logits, fits
from gemma_jax.ops.vocab_loss import vocab_loss

N, D, V, M = 300, 64, 256, 3  # 300 tokens fill two chunks of 256 with a rest of padding
FLOAT8 = "float8_e4m3fn"


def inputs(seed=0, scale=0.3, dim=D):
    rng = np.random.default_rng(seed)
    hidden = np.asarray(jnp.asarray(rng.standard_normal((N, dim)), jnp.bfloat16), np.float64)
    table = np.asarray(jnp.asarray(scale * rng.standard_normal((V, dim)), jnp.bfloat16), np.float64)
    ids = rng.integers(0, V, (N, M)).astype(np.int32)
    ids[3] = ids[3, 0]
    weights = rng.random((N, M))
    weights[5] = 0
    return hidden, table, ids, weights


@pytest.mark.parametrize("side_by_side", [False, True])
def test_kernel(side_by_side):
    hidden, table, *_ = inputs()
    hidden = hidden[:256]
    z = hidden @ table.T
    shift = z[:, 7].astype(np.float32)
    with plgpu.force_gpu_interpret_mode():
        p, total, top = exp_logits(
            jnp.asarray(hidden, jnp.bfloat16),
            jnp.asarray(table, jnp.bfloat16),
            None,
            jnp.asarray(shift),
            tiles=Tiles(side_by_side=side_by_side),
            num_blocks=3,
        )
    expected = np.exp(z - shift[:, None])
    np.testing.assert_allclose(np.asarray(p, np.float64), expected, rtol=2**-8)
    np.testing.assert_allclose(total, expected.sum(1), rtol=1e-5)
    np.testing.assert_allclose(top, z.max(1), rtol=1e-5)


def test_kernel_on_float8():
    hidden, table, *_ = inputs(dim=256)
    hidden = hidden[:256] * np.exp2(np.arange(256) % 4 - 3)[:, None]
    z = rounded(hidden, -1) @ rounded(table, None).T
    shift = z.max(axis=1).astype(np.float32)
    rows, whole = scaled_rows(jnp.float32(hidden)), scaled_whole(jnp.float32(table))
    scale = rows.scale * whole.scale
    with plgpu.force_gpu_interpret_mode():
        p, total, top = exp_logits(
            rows.values, whole.values, scale, jnp.asarray(shift), num_blocks=3
        )
    expected = np.exp(z - shift[:, None])
    np.testing.assert_allclose(np.asarray(p, np.float64), expected, rtol=2**-8)
    np.testing.assert_allclose(total, expected.sum(1), rtol=1e-5)
    np.testing.assert_allclose(top, z.max(1), rtol=1e-5)


def test_what_fits():
    assert fits(256, (512, 128), jnp.bfloat16)
    assert not fits(200, (512, 128), jnp.bfloat16)
    assert not fits(256, (384, 128), jnp.bfloat16)
    assert not fits(256, (512, 100), jnp.bfloat16)
    assert not fits(256, (512, 128), jnp.float32)
    assert fits(256, (512, 128), E4M3)
    assert not fits(256, (512, 64), E4M3)  # 128 bytes of D at least


@pytest.mark.parametrize(
    ("dtype", "softcap", "logits_dtype"),
    [
        ("float32", None, "compute"),
        ("bfloat16", 30.0, "compute"),
        ("bfloat16", None, FLOAT8),
        ("float32", None, FLOAT8),
    ],
)
def test_what_does_not_fit_is_refused(dtype, softcap, logits_dtype):
    hidden, table, ids, weights = inputs()
    with pytest.raises(UserError, match="choose 'auto'"):
        vocab_loss(
            jnp.asarray(hidden, dtype),
            jnp.asarray(table, dtype),
            jnp.asarray(ids),
            jnp.asarray(weights, jnp.float32),
            softcap=softcap,
            backend="fused",
            logits_dtype=logits_dtype,
        )


# With `far`, a target is 70 nats and more from the likeliest word: the shift must be mended.
@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize(
    ("z_loss", "logits_dtype"), [(0.0, "compute"), (0.1, "compute"), (0.1, FLOAT8)]
)
def test_loss_and_gradients(z_loss, logits_dtype, far):
    dim = D if logits_dtype == "compute" else 2 * D
    hidden, table, ids, weights = inputs(scale=3.0 if far else 0.3, dim=dim)
    if logits_dtype == "compute":
        z = hidden @ table.T
    else:
        z = rounded(hidden, -1) @ rounded(table, None).T
    top = z.max(-1)
    if far:
        ids[9] = z[9].argmin()
        assert top[9] - z[9].min() > 70
    lse = top + np.log(np.exp(z - top[:, None]).sum(-1))
    total = weights.sum(-1)
    picked = np.take_along_axis(z, ids, -1)
    loss64 = (total * lse - (weights * picked).sum(-1) + z_loss * total * lse**2).sum()
    dz = (total * (1 + 2 * z_loss * lse))[:, None] * np.exp(z - lse[:, None])
    for n in range(N):
        np.add.at(dz[n], ids[n], -weights[n])
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in (hidden, table)]

    def run(hidden, table):
        return vocab_loss(
            hidden,
            table,
            jnp.asarray(ids),
            jnp.asarray(weights, jnp.float32),
            z_loss=z_loss,
            backend="fused",
            chunk_tokens=256,
            logits_dtype=logits_dtype,
        )

    with plgpu.force_gpu_interpret_mode():
        (loss, stats), (d_hidden, d_table) = jax.value_and_grad(run, (0, 1), has_aux=True)(*arrays)
    np.testing.assert_allclose(loss, loss64, rtol=1e-5)
    np.testing.assert_allclose(stats.lse, lse, rtol=1e-5)
    np.testing.assert_allclose(stats.max_logit, top, rtol=1e-5)
    # Those of float8 are read back from exponentials of bfloat16.
    atol = 1e-4 if logits_dtype == "compute" else 2**-8
    np.testing.assert_allclose(stats.target_logits, picked, rtol=1e-4, atol=atol)
    for ours, exact in ((d_hidden, dz @ table), (d_table, dz.T @ hidden)):
        error = np.linalg.norm(np.asarray(ours, np.float64) - exact) / np.linalg.norm(exact)
        assert error < 5e-3


@pytest.mark.parametrize("logits_dtype", ["compute", FLOAT8])
def test_a_target_that_is_the_likeliest_is_seen_to_be(logits_dtype):
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.standard_normal((256, 640)), jnp.bfloat16)
    table = jnp.asarray(0.05 * rng.standard_normal((256, 640)), jnp.bfloat16)
    factors = [np.asarray(x, np.float64) for x in (hidden, table)]
    if logits_dtype == FLOAT8:
        factors = [rounded(factors[0], -1), rounded(factors[1], None)]
    z = factors[0] @ factors[1].T
    first, second = z.argsort(axis=1)[:, -1], z.argsort(axis=1)[:, -2]
    gap = z.max(axis=1) - np.take_along_axis(z, second[:, None], 1)[:, 0]
    clear = gap > (1e-4 if logits_dtype == "compute" else 2**-7)
    assert clear.mean() > 0.95
    ids = jnp.asarray(np.where(np.arange(256) % 2, first, second)[:, None], jnp.int32)
    with plgpu.force_gpu_interpret_mode():
        _, stats = vocab_loss(
            hidden,
            table,
            ids,
            jnp.ones((256, 1)),
            backend="fused",
            logits_dtype=logits_dtype,
        )
    hit = stats.target_logits[:, 0] >= stats.max_logit
    np.testing.assert_array_equal(hit[clear], (ids[:, 0] == first)[clear])
