"""Mesh sizes and the rules that lay arrays out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from gemma_jax.errors import UserError
from gemma_jax.model.config import tiny
from gemma_jax.model.transformer import Transformer
from gemma_jax.sharding import (
    PRESETS,
    MeshConfig,
    arrange,
    current_layout,
    make_layout,
    split_batch,
)


@pytest.mark.parametrize(
    ("settings", "devices", "expected"),
    [
        ({}, 8, (8, 1, 1)),
        ({}, 1, (1, 1, 1)),
        ({"fsdp": 4, "tensor": 2}, 8, (1, 4, 2)),
        ({"data": 2, "fsdp": -1, "tensor": 2}, 8, (2, 2, 2)),
        ({"data": 2, "fsdp": 2, "tensor": 2}, 8, (2, 2, 2)),
    ],
)
def test_mesh_shapes(settings, devices, expected):
    assert MeshConfig(**settings).shape(devices) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": -1, "fsdp": -1}, "at most one of them -1"),
        ({"data": 0}, "each must be a positive number"),
        ({"tensor": -2}, "each must be a positive number"),
        ({"tensor": 3}, r"does not fit 8 device\(s\)"),
        ({"data": 2, "fsdp": 2}, r"does not fit 8 device\(s\)"),
        ({"data": 16}, r"does not fit 8 device\(s\)"),
    ],
)
def test_meshes_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        MeshConfig(**settings).shape(8)


def test_dimensions_follow_the_rules_and_what_does_not_divide_stays_whole():
    layout = make_layout(MeshConfig(data=2, fsdp=2, tensor=2))
    spec = layout.spec
    assert spec(("vocab", "embed"), (128, 32)) == PartitionSpec("tensor", "fsdp")
    assert spec(("vocab", "embed"), (127, 32)) == PartitionSpec(None, "fsdp")
    assert spec(("embed", "kv_heads", "head_dim"), (32, 1, 8)) == PartitionSpec("fsdp", None, None)
    assert spec((None, "embed"), (3, 5)) == PartitionSpec(None, None)
    assert spec(("heads", "mlp"), (2, 2)) == PartitionSpec("tensor", None)  # an axis is used once
    assert layout.batch_size_multiple == 4


@pytest.mark.parametrize(
    ("axes", "shape", "expected"),
    [
        (("batch", None), (8, 3), (("data", "fsdp"), None)),
        (("batch", None), (2, 3), ("data", None)),  # as far as it divides
        (("batch", None), (1, 3), (None, None)),
        (("batch", "slots", None, None), (8, 16, 1, 8), (("data", "fsdp"), "tensor", None, None)),
    ],
)
def test_a_batch_is_split_as_far_as_it_divides(axes, shape, expected):
    layout = make_layout(MeshConfig(data=2, fsdp=2, tensor=2))
    assert layout.spec(axes, shape) == PartitionSpec(*expected)


@dataclasses.dataclass(frozen=True)
class Chip:
    """What is asked of a TPU v5e to lay out a mesh: one of a slice of 2 x 2."""

    id: int
    slice_index: int
    coords: tuple[int, int, int]
    core_on_chip: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"

    @property
    def process_index(self):
        return self.slice_index


def chips(slices):
    return [
        Chip(4 * number + 2 * y + x, number, (x, y, 0))
        for number in range(slices)
        for y in range(2)
        for x in range(2)
    ]


@pytest.mark.parametrize("shape", [(2, 4, 1), (4, 2, 1), (2, 2, 2), (8, 1, 1)])
def test_the_data_axis_alone_leaves_a_slice(shape):
    grid = arrange(chips(2), shape)
    assert grid.shape == shape
    assert {chip.id for chip in grid.flat} == set(range(8))
    half = shape[0] // 2
    for number in range(2):  # rows of the data axis belong to one slice
        inside = grid[number * half : (number + 1) * half].flat
        assert {chip.slice_index for chip in inside} == {number}


def test_meshes_that_would_leave_a_slice_by_another_axis_are_refused():
    with pytest.raises(UserError, match=r"data=1 .* 2 slices of TPUs.* a multiple of 2"):
        arrange(chips(2), (1, 8, 1))
    assert arrange(chips(1), (1, 2, 2)).shape == (1, 2, 2)


def test_rows_of_a_batch_reach_their_devices():
    layout = make_layout(MeshConfig(data=2, fsdp=2, tensor=2))
    rows = {"x": np.arange(16).reshape(8, 2)}
    assert layout.own_rows(8) == list(range(8))
    for placed in (layout.place(rows), layout.place(rows, 8)):
        np.testing.assert_array_equal(placed["x"], rows["x"])
        assert placed["x"].sharding.is_equivalent_to(layout.batch_sharding(), 2)


@pytest.mark.parametrize("rules", PRESETS)
def test_every_parameter_gets_a_sharding(rules):
    layout = make_layout(MeshConfig(data=2, fsdp=2, tensor=2, rules=rules))
    model = Transformer(tiny())
    shardings = jax.tree.leaves(layout.shardings(model.axes(), model.shapes()))
    used = {axis for sharding in shardings for axis in sharding.spec if axis is not None}
    assert used == {"dp": set(), "fsdp": {"fsdp"}, "fsdp_tp": {"fsdp", "tensor"}}[rules]


def test_a_layout_is_active_within_its_block():
    layout = make_layout(MeshConfig())
    x = jnp.zeros((8, 2))
    assert current_layout() is None
    assert split_batch(x) is x
    with layout.active():
        assert current_layout() is layout
        assert jax.jit(split_batch)(x).sharding.is_equivalent_to(layout.batch_sharding(), 2)
    assert current_layout() is None
