"""The fused head, its kernel interpreted on the CPU, against the dense loss in float64."""

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_jax.errors import UserError
from gemma_jax.ops.vocab_kernel import Tiles, exp_logits, fits
from gemma_jax.ops.vocab_loss import vocab_loss

N, D, V, M = 300, 64, 256, 3  # 300 tokens fill two chunks of 256 with a rest of padding


def inputs(seed=0, scale=0.3):
    rng = np.random.default_rng(seed)
    hidden = np.asarray(jnp.asarray(rng.standard_normal((N, D)), jnp.bfloat16), np.float64)
    table = np.asarray(jnp.asarray(scale * rng.standard_normal((V, D)), jnp.bfloat16), np.float64)
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
            jnp.asarray(shift),
            tiles=Tiles(side_by_side=side_by_side),
            num_blocks=3,
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


@pytest.mark.parametrize(("dtype", "softcap"), [("float32", None), ("bfloat16", 30.0)])
def test_what_does_not_fit_is_refused(dtype, softcap):
    hidden, table, ids, weights = inputs()
    with pytest.raises(UserError, match="choose 'auto'"):
        vocab_loss(
            jnp.asarray(hidden, dtype),
            jnp.asarray(table, dtype),
            jnp.asarray(ids),
            jnp.asarray(weights, jnp.float32),
            softcap=softcap,
            backend="fused",
        )


# With `far`, a target is 70 nats and more from the likeliest word: the shift must be mended.
@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_loss_and_gradients(z_loss, far):
    hidden, table, ids, weights = inputs(scale=3.0 if far else 0.3)
    z = hidden @ table.T
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
        )

    with plgpu.force_gpu_interpret_mode():
        (loss, stats), (d_hidden, d_table) = jax.value_and_grad(run, (0, 1), has_aux=True)(*arrays)
    np.testing.assert_allclose(loss, loss64, rtol=1e-5)
    np.testing.assert_allclose(stats.lse, lse, rtol=1e-5)
    np.testing.assert_allclose(stats.max_logit, top, rtol=1e-5)
    np.testing.assert_allclose(stats.target_logits, picked, rtol=1e-4, atol=1e-4)
    for ours, exact in ((d_hidden, dz @ table), (d_table, dz.T @ hidden)):
        error = np.linalg.norm(np.asarray(ours, np.float64) - exact) / np.linalg.norm(exact)
        assert error < 5e-3


def test_a_target_that_is_the_likeliest_is_seen_to_be():
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.standard_normal((256, 640)), jnp.bfloat16)
    table = jnp.asarray(0.05 * rng.standard_normal((256, 640)), jnp.bfloat16)
    z = np.asarray(hidden, np.float64) @ np.asarray(table, np.float64).T
    first, second = z.argsort(axis=1)[:, -1], z.argsort(axis=1)[:, -2]
    ids = jnp.asarray(np.where(np.arange(256) % 2, first, second)[:, None], jnp.int32)
    with plgpu.force_gpu_interpret_mode():
        _, stats = vocab_loss(hidden, table, ids, jnp.ones((256, 1)), backend="fused")
    hit = stats.target_logits[:, 0] >= stats.max_logit
    np.testing.assert_array_equal(hit, ids[:, 0] == first)
