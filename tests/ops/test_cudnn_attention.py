"""What cuDNN is told of packed documents; attention itself is tested on a GPU (test_gpu.py)."""

import jax.numpy as jnp
import numpy as np
import pytest

from gemma_jax.ops.cudnn_attention import can_do, documents, documents_expected
from gemma_jax.ops.masks import MaskSpec


def test_documents_begin_where_ids_change():
    ids = jnp.asarray([[1, 1, 1, 2, 2, 3, 0, 0], [1] * 8], jnp.int32)
    found = documents(ids, 5)
    np.testing.assert_array_equal(found.starts, [[0, 3, 5, 6, -1, -1], [0, -1, -1, -1, -1, -1]])
    np.testing.assert_array_equal(found.lengths, [[3, 2, 1, 2, -1], [8, -1, -1, -1, -1]])
    assert found.complete


def test_as_many_documents_as_there_may_be():
    ids = jnp.asarray([[1, 1, 2, 3]], jnp.int32)
    found = documents(ids, 3)
    np.testing.assert_array_equal(found.starts, [[0, 2, 3, -1]])
    np.testing.assert_array_equal(found.lengths, [[2, 1, 1]])
    assert found.complete
    assert not documents(ids, 2).complete


@pytest.mark.parametrize(
    ("ids", "complete"),
    [([1, 1, 2, 1], False), ([0, 0, 1, 0], False), ([2, 1, 1, 1], True), ([0, 0, 1, 2], True)],
)
def test_an_id_with_two_runs_is_left_to_others(ids, complete):
    assert bool(documents(jnp.asarray([ids], jnp.int32), 4).complete) is complete


def test_a_sequence_shorter_than_the_bound():
    found = documents(jnp.asarray([[1, 2]], jnp.int32), documents_expected(2))
    assert found.starts.shape == (1, 17)
    np.testing.assert_array_equal(found.lengths[0, :3], [1, 1, -1])
    assert found.complete


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, True),
        ({"dtype": jnp.float32}, False),
        ({"head_dim": 260}, False),
        ({"head_dim": 512}, False),
        ({"keys": 9}, False),
        ({"softcap": 30.0}, False),
        ({"spec": MaskSpec(q_positions=jnp.zeros((1, 8), jnp.int32))}, False),
    ],
)
def test_what_it_can_do(change, expected):
    dtype, H = change.get("dtype", jnp.bfloat16), change.get("head_dim", 64)
    q = jnp.zeros((1, 8, 2, H), dtype)
    k = jnp.zeros((1, change.get("keys", 8), 1, H), dtype)
    assert can_do(q, k, change.get("spec", MaskSpec()), change.get("softcap")) is expected
