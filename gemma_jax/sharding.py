"""The device mesh and the rules that lay arrays out on it. No other file names a mesh axis.

The mesh has three axes: `data` (copies of the parameters), `fsdp` (parameters, gradients and
optimizer state split, gathered when used; Rajbhandari et al. 2020) and `tensor` (matrices split
and computed in parts; Shoeybi et al. 2019). Modules name the *logical* axes of their arrays
("vocab", "mlp", ...); a `ShardingRules` says which mesh axis each of them is split over. XLA
inserts the collectives, where an op does not do so itself in a `shard_map`.
"""

import bisect
import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gemma_jax.errors import UserError
from gemma_jax.settings import check_types

MESH_AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardingRules:
    """Logical axis -> mesh axis, or None for "not split".

    `batch` is the leading dimension of every batch; an axis that splits it and a parameter too
    splits that one for storage alone: it is gathered where it is used. `slots` are those of a KV
    cache whose kv heads cannot be split. A dimension that its mesh axis does not divide (one kv
    head, say) stays whole, and an axis splits one dimension of an array at most, the first.
    """

    batch: tuple[str, ...] = BATCH_AXES
    vocab: str | None = None
    embed: str | None = None
    mlp: str | None = None
    heads: str | None = None
    kv_heads: str | None = None
    head_dim: str | None = None
    layers: str | None = None
    slots: str | None = None


PRESETS = {
    "dp": ShardingRules(),
    "fsdp": ShardingRules(embed="fsdp"),
    "fsdp_tp": ShardingRules(
        embed="fsdp",
        vocab="tensor",
        mlp="tensor",
        heads="tensor",
        kv_heads="tensor",
        slots="tensor",
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

    def batch_sharding(self) -> NamedSharding:
        """Leading dimension split over the batch axes, the others whole."""
        return NamedSharding(self.mesh, PartitionSpec(self.rules.batch))

    def own_rows(self, batch_size: int) -> list[int]:
        """Which rows of a batch lie on this process's devices, in order; it needs no others.

        Rows lie on several processes where one of them holds only a part of the other axes.
        """
        return list(_own_rows(self, batch_size))

    def place(
        self, rows: Mapping[str, np.ndarray], batch_size: int | None = None
    ) -> dict[str, jax.Array]:
        """Arrays of a global batch, from this process's `own_rows` of it.

        Without `batch_size`, `rows` is the whole batch, the same in every process.
        """

        def array(x: np.ndarray) -> jax.Array:
            size = len(x) if batch_size is None else batch_size
            held = range(size) if batch_size is None else self.own_rows(size)
            shape = (size, *x.shape[1:])
            sharding = NamedSharding(self.mesh, self.spec(("batch",), (size,)))

            def part(index: Any) -> np.ndarray:
                start, stop, _ = index[0].indices(size)
                at = bisect.bisect_left(held, start)
                return x[at : at + stop - start]

            return jax.make_array_from_callback(shape, sharding, part)

        return {name: array(x) for name, x in rows.items()}

    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    def spec(self, axes: Sequence[str | None], shape: Sequence[int]) -> PartitionSpec:
        """The partition of an array with these logical axes; what does not divide stays whole."""
        taken: set[str] = set()
        chosen: list[str | tuple[str, ...] | None] = []
        for name, size in zip(axes, shape, strict=True):
            rule = getattr(self.rules, name) if name else None
            kept: tuple[str, ...] = ()
            for axis in (rule,) if isinstance(rule, str) else rule or ():
                parts = math.prod(self.mesh.shape[one] for one in (*kept, axis))
                if axis not in taken and self.mesh.shape[axis] > 1 and size % parts == 0:
                    kept = (*kept, axis)
            taken.update(kept)
            chosen.append(kept if len(kept) > 1 else kept[0] if kept else None)
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
        with _LAYOUT(self), jax.set_mesh(self.mesh):
            yield self


# JAX compiles a function anew where this one has another value.
_LAYOUT: Any = jax.make_user_context(None)


@functools.lru_cache(maxsize=64)
def _own_rows(layout: Layout, batch_size: int) -> tuple[int, ...]:
    sharding = NamedSharding(layout.mesh, layout.spec(("batch",), (batch_size,)))
    parts = sharding.addressable_devices_indices_map((batch_size,)).values()
    held = {row for part in parts if part for row in range(*part[0].indices(batch_size))}
    return tuple(sorted(held))


def make_layout(config: MeshConfig, devices: list[Any] | None = None) -> Layout:
    """The layout of `config` on `devices` (all of them when not given)."""
    devices = jax.devices() if devices is None else devices
    shape = config.shape(len(devices))
    types = (AxisType.Auto,) * len(MESH_AXES)
    mesh = Mesh(arrange(devices, shape), MESH_AXES, axis_types=types)
    return Layout(mesh, PRESETS[config.rules])


def chosen_layout(config: MeshConfig | None) -> Layout | None:
    """The layout that was asked for; None, "the first device", where none was and there is but one
    process. Several have to share what they compute."""
    if config is None and jax.process_count() == 1:
        return None
    return make_layout(config or MeshConfig())


def active(layout: Layout | None) -> contextlib.AbstractContextManager[Any]:
    """Makes a layout active, if there is one."""
    return contextlib.nullcontext() if layout is None else layout.active()


def arrange(devices: Sequence[Any], shape: tuple[int, int, int]) -> np.ndarray:
    """The devices as a grid [data, fsdp, tensor] whose busiest axes follow the fastest links.

    Of several TPU slices, which a slower network joins, each holds whole rows of the data axis:
    nothing but gradients crosses it. Elsewhere the devices of a process are neighbours.
    """
    if devices[0].platform != "tpu":
        return np.array(devices).reshape(shape)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    data, fsdp, tensor = shape
    if data % slices:
        raise UserError(
            f"mesh data={data} does not divide over the {slices} slices of TPUs, and no other axis "
            f"may leave a slice; set mesh.data to a multiple of {slices}."
        )
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return mesh_utils.create_hybrid_device_mesh(
        (data // slices, fsdp, tensor),
        (slices, 1, 1),
        devices,
        allow_split_physical_axes=True,
    )


def current_layout() -> Layout | None:
    """The layout made active around this call, if any; None too where it is of one device."""
    layout = _LAYOUT.value
    return None if layout is None or layout.mesh.size == 1 else layout


def pin(x: jax.Array, *axes: str | None) -> jax.Array:
    """`x` laid out by its logical axes; those left out are whole. Without a layout a no-op."""
    layout = current_layout()
    if layout is None:
        return x
    spec = layout.spec((*axes, *[None] * (x.ndim - len(axes))), x.shape)
    return jax.lax.with_sharding_constraint(x, NamedSharding(layout.mesh, spec))


def split_batch(x: jax.Array) -> jax.Array:
    """Pins an activation: batch (leading) dimension split, the others whole."""
    return pin(x, "batch")


def gather_parameter(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """Pins a parameter to how it is used: whole along the mesh axes that split the batch.

    Said here so that parameters are gathered, and never the tokens that meet them.
    """
    layout = current_layout()
    if layout is None:
        return x
    stored = layout.spec(axes, x.shape)
    used = [None if axis in layout.rules.batch else axis for axis in stored]
    sharding = NamedSharding(layout.mesh, PartitionSpec(*used))
    return jax.lax.with_sharding_constraint(x, sharding)
