"""Masks as literal 0/1 matrices."""

import jax.numpy as jnp
import numpy as np
import pytest

from gemma_jax.ops.masks import MaskSpec, dense_mask


def matrix(text: str) -> np.ndarray:
    return np.array([[int(c) for c in line.split()] for line in text.strip().splitlines()], bool)


CAUSAL = matrix("""
    1 0 0 0 0
    1 1 0 0 0
    1 1 1 0 0
    1 1 1 1 0
    1 1 1 1 1
""")
WINDOW_2 = matrix("""
    1 0 0 0 0
    1 1 0 0 0
    0 1 1 0 0
    0 0 1 1 0
    0 0 0 1 1
""")
SEGMENTS_11122 = matrix("""
    1 0 0 0 0
    1 1 0 0 0
    1 1 1 0 0
    0 0 0 1 0
    0 0 0 1 1
""")


@pytest.mark.parametrize(
    ("window", "expected"),
    [(None, CAUSAL), (2, WINDOW_2), (1, np.eye(5, dtype=bool)), (5, CAUSAL), (9, CAUSAL)],
)
def test_causal_and_window(window, expected):
    np.testing.assert_array_equal(dense_mask(MaskSpec(window=window), 5, 5)[0], expected)


def test_segments_do_not_see_each_other():
    ids = jnp.array([[1, 1, 1, 2, 2]], jnp.int32)
    spec = MaskSpec(q_segment_ids=ids, k_segment_ids=ids)
    np.testing.assert_array_equal(dense_mask(spec, 5, 5)[0], SEGMENTS_11122)


def test_positions_out_of_order():
    """A ring buffer of four slots that holds positions 4, 5, 2, 3."""
    spec = MaskSpec(
        window=3,
        q_positions=jnp.array([[5]], jnp.int32),
        k_positions=jnp.array([[4, 5, 2, 3]], jnp.int32),
    )
    np.testing.assert_array_equal(dense_mask(spec, 1, 4)[0], matrix("1 1 0 1"))
