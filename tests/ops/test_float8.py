"""Rounding of matmul operands to e4m3, against ml_dtypes in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from float8_numpy import rounded
from jax.sharding import AxisType, PartitionSpec

from gemma_jax.ops.float8 import E4M3, Scaled, scaled_rows, scaled_whole


def numbers(dtype):
    """[7, 257] of many magnitudes; a row of nothing, one of tiny numbers, one with a giant."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((7, 257)) * np.exp2(rng.uniform(-25, 10, (7, 257)))
    x[2] = 0
    x[3] *= 1e-30
    x[4, 5] = 3e37
    return jnp.asarray(x, dtype)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rows_and_the_whole(dtype):
    x = numbers(dtype)
    whole = np.asarray(x, np.float64)
    few, low = x[:4], whole[:4]  # without the giant, beside which the others are nothing
    for found, exact, axis in (
        (scaled_rows(x), whole, -1),
        (scaled_whole(x), whole, None),
        (scaled_whole(few), low, None),
    ):
        assert found.values.dtype == E4M3
        np.testing.assert_array_equal(np.frexp(np.asarray(found.scale))[0], 0.5)
        scale = np.asarray(found.scale, np.float64)[..., None]
        np.testing.assert_array_equal(
            np.asarray(found.values, np.float64) * scale, rounded(exact, axis)
        )


def test_how_far_a_number_moves():
    x = np.asarray(numbers(jnp.float32), np.float64)
    found = scaled_rows(jnp.asarray(x, jnp.float32))
    moved = np.abs(np.asarray(found.values, np.float64) * np.asarray(found.scale)[:, None] - x)
    largest = np.abs(x).max(axis=1, keepdims=True)
    assert (moved <= np.maximum(2.0**-4 * np.abs(x), 2.0**-17 * largest)).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_no_number_stays_none(bad):
    x = numbers(jnp.float32).at[1, 3].set(bad)
    rows = scaled_rows(x)
    assert np.isnan(np.asarray(rows.values[1] * 1.0)).any()
    assert np.isfinite(np.asarray(rows.values, np.float32)[5]).all()
    assert np.isnan(np.asarray(scaled_whole(x).values, np.float32)).any()


def test_parts_have_the_scale_of_the_whole():
    x = numbers(jnp.float32)[:6]
    mesh = jax.make_mesh((2,), ("tensor",), axis_types=(AxisType.Auto,))
    part = PartitionSpec("tensor")
    values, scale = jax.shard_map(
        lambda x: scaled_whole(x, "tensor"),
        mesh=mesh,
        in_specs=part,
        out_specs=Scaled(part, PartitionSpec()),
        check_vma=False,
    )(x)
    whole = scaled_whole(x)
    np.testing.assert_array_equal(scale, whole.scale)
    np.testing.assert_array_equal(
        np.asarray(values, np.float32), np.asarray(whole.values, np.float32)
    )
