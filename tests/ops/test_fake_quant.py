"""Fake quantisation against packed blocks, written-out codes and the gradient of the identity."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType, dequantize

from gemma_jax.interop.blocks import pack_q4_0
from gemma_jax.ops.fake_quant import fake_quantize


def rows(seed=0, shape=(512, 96)):
    """Weights of many sizes, blocks of zeros, equal magnitudes of both signs, halves, tiny ones."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) * 10.0 ** rng.uniform(-6, 1, (shape[0], 1))
    x[0], x[1] = 0, np.tile([1.0, -1.0], shape[1] // 2)
    x[2] = np.resize([-8.0, 0.5, 1.5, -0.5, 7.5, 8.0], shape[1])
    x[3], x[4] = 1e-30, 1e-42
    x[5] = np.resize(np.arange(-16, 16) / 2, shape[1])
    return x.astype(np.float32)


def unpacked(x):
    return dequantize(pack_q4_0(x), GGMLQuantizationType.Q4_0)


@pytest.mark.parametrize("jit", [False, True])
def test_q4_0_is_what_a_gguf_holds(jit):
    quantize = jax.jit(fake_quantize, static_argnums=(1, 2)) if jit else fake_quantize
    for seed in range(4):
        x = rows(seed)
        np.testing.assert_array_equal(quantize(jnp.asarray(x), "q4_0", (1,)), unpacked(x))


@pytest.mark.slow
def test_q4_0_of_millions_of_weights_has_no_exception():
    """One rounding too few in x / d + 8.5 shows in one of some hundred thousand."""
    quantize = jax.jit(fake_quantize, static_argnums=(1, 2))
    for seed in range(8):
        x = np.random.default_rng(seed).standard_normal((8192, 640)).astype(np.float32)
        np.testing.assert_array_equal(quantize(jnp.asarray(x), "q4_0", (1,)), unpacked(x))


@pytest.mark.parametrize(
    ("shape", "inputs"),
    [((64, 3, 5), (0,)), ((4, 16, 6), (0, 1)), ((2, 64, 3), (1,)), ((7, 32), (1,))],
)
def test_blocks_run_along_the_inputs(shape, inputs):
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    outputs = [i for i in range(x.ndim) if i not in inputs]
    moved = x.transpose([*outputs, *inputs])
    expected = unpacked(moved.reshape(-1, int(np.prod([shape[i] for i in inputs]))))
    back = np.argsort([*outputs, *inputs])
    found = fake_quantize(jnp.asarray(x), "q4_0", inputs)
    np.testing.assert_array_equal(found, expected.reshape(moved.shape).transpose(back))


def test_q4_0_twice_is_q4_0_once():
    once = fake_quantize(jnp.asarray(rows()), "q4_0", (1,))
    np.testing.assert_array_equal(fake_quantize(once, "q4_0", (1,)), once)


def test_int4_takes_the_nearest_of_fifteen_multiples():
    x = rows().astype(np.float64)
    found = np.asarray(fake_quantize(jnp.asarray(x, jnp.float32), "int4", (1,)))
    scale = np.abs(x).max(axis=1, keepdims=True) / 7
    grid = scale[:, :, None] * np.arange(-7, 8)
    nearest = np.abs(x[:, :, None] - grid).min(axis=2)
    np.testing.assert_allclose(np.abs(x - found), nearest, atol=1e-6 * scale.max())
    for row in found[5:50]:
        assert len(np.unique(row)) <= 15


# The values on which gemma.cpp's own test of the format insists.
SFP8 = [
    (0.46875, 0.46875),
    (0.9375, 0.9375),
    (0.484375, 0.5),
    (0.96875, 1.0),
    (0.28125, 0.28125),
    (0.296875, 0.3125),
    (0.59375, 0.625),
    (0.279296875, 0.28125),
    (0.265625, 0.25),
    (0.53125, 0.5),
    (0.0068359375, 0.0068359375),
    (0.00732421875, 0.0078125),
    (0.007568359375, 0.0078125),
    (1.0625, 1.0),
    (2.384185791015625e-07, 2.384185791015625e-07),
    (1.1920928955078125e-07, 1.4901161193847656e-07),
    (5.960464477539063e-08, 0.0),
    (8.940696716308594e-08, 0.0),
    (1.1175870895385742e-07, 1.4901161193847656e-07),
    (0.013841, 0.013671875),
    (0.0, 0.0),
]


def sfp8_codes():
    """Every value of the format, from its definition: exponent and mantissa of each code."""
    fine = [(1 + m / 8) * 2.0 ** (e - 15) for e in range(8, 16) for m in range(8)]
    coarse = [(1 + m / 4) * 2.0 ** (e - 23) for e in range(16) for m in range(4)]
    return np.array([0.0, *coarse[1:], *fine])


def test_sfp8_agrees_with_its_definition():
    given, expected = np.array(SFP8, np.float32).T
    for sign in (1, -1):
        found = fake_quantize(jnp.asarray(sign * given), "sfp8", (0,))
        np.testing.assert_array_equal(found, sign * expected)
    codes = sfp8_codes().astype(np.float32)
    np.testing.assert_array_equal(fake_quantize(jnp.asarray(codes), "sfp8", (0,)), codes)
    x = np.random.default_rng(0).uniform(-1.875, 1.875, 20_000).astype(np.float32)
    distance = np.abs(np.abs(x)[:, None] - codes).min(axis=1)
    np.testing.assert_array_equal(
        np.abs(x - np.asarray(fake_quantize(jnp.asarray(x), "sfp8", (0,)))), distance
    )


def test_sfp8_scales_what_it_cannot_hold():
    x = jnp.asarray([[7.5, -3.75, 0.0, 1e-3]], jnp.float32)
    found = fake_quantize(x, "sfp8", (1,))
    np.testing.assert_allclose(found, x, rtol=2**-3)
    assert found[0, 0] == 7.5


@pytest.mark.parametrize("scheme", ["q4_0", "int4", "sfp8"])
def test_the_gradient_passes_straight_through(scheme):
    x, g = jnp.asarray(rows(2, (8, 64))), jnp.asarray(rows(3, (8, 64)))
    value, pullback = jax.vjp(lambda w: fake_quantize(w, scheme, (1,)), x)
    np.testing.assert_array_equal(pullback(g)[0], g)
    assert not np.array_equal(value, x)
    half = fake_quantize(x.astype(jnp.bfloat16), scheme, (1,))
    assert half.dtype == jnp.bfloat16


def test_a_width_that_gives_no_blocks_is_refused():
    with pytest.raises(ValueError, match="multiple of 32 inputs"):
        fake_quantize(jnp.zeros((40, 4)), "q4_0", (0,))
