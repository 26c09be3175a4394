"""The device mesh and the rules that lay arrays out on it. No other file names a mesh axis.

The mesh has three axes: `data` (copies of the parameters), `fsdp` (parameters, gradients and
optimizer state split, gathered when used; Rajbhandari et al. 2020) and `tensor` (matrices split
and computed in parts; Shoeybi et al. 2019). Modules name the *logical* axes of their arrays
("vocab", "mlp", ...); a `ShardingRules` says which mesh axis each of them is split over. XLA
inserts the collectives (GSPMD).
"""

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Iterator
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gemma_jax.errors import UserError
from gemma_jax.settings import check_types

MESH_AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardingRules:
    """Logical axis -> mesh axis, or None for "not split".

    `batch` is the leading dimension of every batch. A dimension that its mesh axis does not
    divide (one kv head, say) stays whole.
    """

    batch: tuple[str, ...] = BATCH_AXES
    vocab: str | None = None
    embed: str | None = None
    mlp: str | None = None
    heads: str | None = None
    kv_heads: str | None = None
    head_dim: str | None = None
    layers: str | None = None


PRESETS = {
    "dp": ShardingRules(),
    "fsdp": ShardingRules(embed="fsdp"),
    "fsdp_tp": ShardingRules(
        embed="fsdp", vocab="tensor", mlp="tensor", heads="tensor", kv_heads="tensor"
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How many devices each mesh axis spans; one of them may be -1, "all that are left"."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    rules: Literal["dp", "fsdp", "fsdp_tp"] = "fsdp_tp"

    def __post_init__(self) -> None:
        check_types(self)

    def shape(self, num_devices: int) -> tuple[int, int, int]:
        sizes = [self.data, self.fsdp, self.tensor]
        if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
            raise UserError(
                f"mesh sizes data={self.data}, fsdp={self.fsdp}, tensor={self.tensor}: each must "
                "be a positive number, and at most one of them -1 (all devices that are left)."
            )
        fixed = math.prod(size for size in sizes if size != -1)
        if num_devices % fixed or (-1 not in sizes and fixed != num_devices):
            raise UserError(
                f"mesh data={self.data}, fsdp={self.fsdp}, tensor={self.tensor} does not fit "
                f"{num_devices} device(s); set mesh.data, mesh.fsdp and mesh.tensor so that their "
                "product is that number, or one of them to -1."
            )
        data, fsdp, tensor = (num_devices // fixed if size == -1 else size for size in sizes)
        return data, fsdp, tensor


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh with its rules. `with layout:` makes it the one that the model and the ops see."""

    mesh: Mesh
    rules: ShardingRules

    @property
    def batch_size_multiple(self) -> int:
        return math.prod(self.mesh.shape[axis] for axis in self.rules.batch)

    def batch_spec(self) -> PartitionSpec:
        return PartitionSpec(self.rules.batch)

    def batch_sharding(self) -> NamedSharding:
        """Leading dimension split over the batch axes, the others whole."""
        return NamedSharding(self.mesh, self.batch_spec())

    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    def spec(self, axes: tuple[str | None, ...], shape: tuple[int, ...]) -> PartitionSpec:
        """The partition of one array with these logical axes; what does not divide stays whole."""
        chosen: list[str | None] = []
        for name, size in zip(axes, shape, strict=True):
            axis = getattr(self.rules, name) if name else None
            if axis in chosen or (axis and size % self.mesh.shape[axis]):
                axis = None
            chosen.append(axis)
        return PartitionSpec(*chosen)

    def shardings(self, axes: Any, shapes: Any) -> Any:
        """A tree of NamedSharding for a tree of logical axes and one of arrays or shapes."""
        return jax.tree.map(
            lambda array, names: NamedSharding(self.mesh, self.spec(names, array.shape)),
            shapes,
            axes,
        )

    @contextlib.contextmanager
    def active(self) -> Iterator["Layout"]:
        token = _LAYOUT.set(self)
        try:
            with jax.set_mesh(self.mesh):
                yield self
        finally:
            _LAYOUT.reset(token)


_LAYOUT: contextvars.ContextVar[Layout | None] = contextvars.ContextVar("layout", default=None)


def make_layout(config: MeshConfig, devices: list[Any] | None = None) -> Layout:
    """The layout of `config` on `devices` (all of them when not given)."""
    devices = jax.devices() if devices is None else devices
    shape = config.shape(len(devices))
    types = (AxisType.Auto,) * len(MESH_AXES)
    if devices and devices[0].platform == "cpu":
        mesh = Mesh(np.array(devices).reshape(shape), MESH_AXES, axis_types=types)
    else:  # on real hardware the order of devices follows the links between them
        mesh = jax.make_mesh(shape, MESH_AXES, axis_types=types, devices=devices)
    return Layout(mesh, PRESETS[config.rules])


def current_layout() -> Layout | None:
    """The layout made active around this call, if any."""
    return _LAYOUT.get()


def split_batch(x: jax.Array) -> jax.Array:
    """Pins an activation: batch (leading) dimension split, the others whole. Alone: a no-op."""
    layout = current_layout()
    if layout is None or layout.mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, layout.batch_sharding())
