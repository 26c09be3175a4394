"""Exponentials of logits on Hopper GPUs, made while the logits still lie in registers.

XLA writes the logits [n, V] in float32 and reads them back for their maximum, their sum of
exponentials and their gradient: three times the traffic of all else that the head does. Here a
tile of logits is exponentiated, summed and rounded before it leaves the multiprocessor, so that
what is written is exp(z - shift) in bfloat16, once, and the logits themselves never exist. The
idea of a fused epilogue is that of Cut Cross-Entropy (arXiv 2411.09009); unlike there the
exponentials are kept, because two matmuls that read them cost less than a third that makes the
logits again.

A Pallas kernel for Mosaic GPU: persistent blocks, one warpgroup that feeds shared memory, two that
multiply.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, BFloat16, Bool, Float, Float32

from gemma_jax.ops.float8 import E4M3

_LOG2_E = math.log2(math.e)
_SWIZZLE = 128  # bytes
_PIECE = 64  # rows and columns of an output tile that leave at once


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """`rows` x `columns` logits a warpgroup, `depth` bytes of D a step; `side_by_side` warpgroups
    share rows, otherwise columns; blocks walk the grid in bands of `band` tiles."""

    rows: int = 128
    columns: int = 128
    depth: int = 128
    steps: int = 4
    band: int = 8
    side_by_side: bool = True
    slots: int = 1  # pieces of the output under way

    @property
    def block(self) -> tuple[int, int]:
        return (self.rows, 2 * self.columns) if self.side_by_side else (2 * self.rows, self.columns)

    def depth_of(self, dtype: Any) -> int:
        """Of D a step."""
        return self.depth // jnp.dtype(dtype).itemsize


def fits(num_rows: int, shape: tuple[int, ...], dtype: Any, tiles: Tiles | None = None) -> bool:
    """Whether the kernel can do `num_rows` rows of hidden states and a table of this shape."""
    rows, columns = (tiles or Tiles()).block
    return (
        dtype in (jnp.bfloat16, E4M3)
        and num_rows % rows == 0
        and shape[0] % columns == 0
        and shape[1] % (tiles or Tiles()).depth_of(dtype) == 0
    )


def exp_logits(
    hidden: Float[Array, "n D"],
    table: Float[Array, "V D"],
    scale: Float32[Array, " n"] | None,
    shift: Float32[Array, " n"],
    *,
    instead: tuple[Bool[Array, ""], BFloat16[Array, "n V"]] | None = None,
    tiles: Tiles | None = None,
    num_blocks: int | None = None,
) -> tuple[BFloat16[Array, "n V"], Float32[Array, " n"], Float32[Array, " n"]]:
    """(exp(z - shift), its sum over V, max of z) of the logits z = scale * (hidden @ table.T).

    Both operands are bfloat16 or both float8_e4m3fn; a `scale` that is None is 1. Logits, sum and
    maximum are float32; only what is written is rounded. `num_blocks` is the number of
    multiprocessors.

    With `instead` = (wanted, p) the exponentials are written over p. Where they are not wanted the
    kernel ends at once, p comes back as it was, and sum and maximum are whatever lay in memory. A
    condition of the program would have to be told to the host, which waits for the device.
    """
    tiles = tiles or Tiles()
    (n, _), V = hidden.shape, table.shape[0]
    if not fits(n, table.shape, hidden.dtype, tiles) or table.dtype != hidden.dtype:
        raise ValueError(f"no kernel for {hidden.shape} x {table.shape} {hidden.dtype}")
    if num_blocks is None:
        num_blocks = getattr(jax.devices()[0], "core_count", 1)
    statistics = jax.ShapeDtypeStruct((V // tiles.columns, n), jnp.float32)
    fresh = () if instead else (jax.ShapeDtypeStruct((n, V), jnp.bfloat16),)
    run = plgpu.kernel(
        functools.partial(_kernel, tiles, instead is not None),
        out_type=(*fresh, statistics, statistics),
        grid=(num_blocks,),
        grid_names=("block",),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
    )
    vectors = (shift,) if scale is None else (shift, scale)
    if instead is None:
        p, sums, tops = run(hidden, table, *vectors)
    else:
        wanted, p = instead
        there = jax.new_ref(p)
        sums, tops = run(hidden, table, *vectors, wanted.astype(jnp.int32)[None], there)
        p = there[...]
    return p, sums.sum(axis=0), tops.max(axis=0)


def _kernel(tiles: Tiles, in_place: bool, hidden: Any, table: Any, *others: Any) -> None:
    *vectors, out, sums, tops = others  # of the rows: shift, and scale where there is one
    wanted = vectors.pop() if in_place else None
    rows, columns, depth = tiles.rows, tiles.columns, tiles.depth_of(hidden.dtype)
    block_rows, block_columns = tiles.block
    counts = hidden.shape[0] // block_rows, table.shape[0] // block_columns
    tiling: Any = plgpu.TilingTransform  # type checkers take both for abstract
    swizzle: Any = plgpu.SwizzleTransform

    def layout(dtype: Any) -> tuple[Any, Any]:
        return tiling((8, _SWIZZLE // jnp.dtype(dtype).itemsize)), swizzle(_SWIZZLE)

    def pipeline(body: Any, context: Any) -> Any:
        return plgpu.emit_pipeline_warp_specialized(
            body,
            grid=(hidden.shape[1] // depth,),
            memory_registers=40,
            in_specs=[
                plgpu.BlockSpec(
                    (size, depth),
                    lambda k: (0, k),
                    transforms=layout(hidden.dtype),
                    memory_space=plgpu.SMEM,
                )
                for size in (block_rows, block_columns)
            ],
            wg_axis="warpgroup",
            num_compute_wgs=2,
            max_concurrent_steps=tiles.steps,
            compute_context=context,
        )

    def nothing(*_: Any, **__: Any) -> None:
        return None

    @functools.partial(
        pl.run_scoped,
        buffers=pipeline(nothing, nothing).get_allocations(hidden, table),
        staged=plgpu.SMEM(
            (2, tiles.slots, _PIECE, _PIECE), jnp.bfloat16, transforms=layout(jnp.bfloat16)
        ),
        own=plgpu.SMEM((2, len(vectors), rows), jnp.float32),
        statistics=plgpu.SMEM((2, 2, rows), jnp.float32),
        arrived=plgpu.Barrier(num_barriers=2, num_arrivals=len(vectors)),
        collective_axes="warpgroup",
    )
    def _block(buffers: Any, staged: Any, own: Any, statistics: Any, arrived: Any) -> None:
        group = lax.axis_index("warpgroup")

        def _tile(loop: Any) -> None:
            i, j = plgpu.planar_snake(loop.index[0], counts, 0, tiles.band)
            row, column = i * block_rows, j * block_columns
            own_rows: Any
            own_columns: Any
            if tiles.side_by_side:
                own_rows, own_columns = slice(None), pl.ds(group * columns, columns)
                first_row, first_column = row, column + group * columns
            else:
                own_rows, own_columns = pl.ds(group * rows, rows), slice(None)
                first_row, first_column = row + group * rows, column

            def compute(multiply: Any) -> None:
                for place, vector in enumerate(vectors):
                    plgpu.copy_gmem_to_smem(
                        vector.at[pl.ds(first_row, rows)], own.at[group, place], arrived.at[group]
                    )

                @functools.partial(
                    pl.run_scoped, accumulator=plgpu.ACC((rows, columns), jnp.float32)
                )
                def _(accumulator: Any) -> None:
                    multiply(accumulator)
                    plgpu.barrier_wait(arrived.at[group])
                    z = accumulator[...]
                    shift, *scale = (
                        lax.broadcast_in_dim(own[group, place], z.shape, [0])
                        for place in range(len(vectors))
                    )
                    z = z * scale[0] if scale else z
                    p = jnp.exp2((z - shift) * _LOG2_E)
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    statistics[group, 0] = p.sum(axis=1)
                    statistics[group, 1] = z.max(axis=1)
                    rounded = p.astype(jnp.bfloat16)
                    pieces = [
                        (r, c) for r in range(rows // _PIECE) for c in range(columns // _PIECE)
                    ]
                    for number, (r, c) in enumerate(pieces):
                        slot = number % tiles.slots
                        if number >= tiles.slots:
                            plgpu.wait_smem_to_gmem(tiles.slots - 1, wait_read_only=True)
                        staged[group, slot] = rounded[
                            r * _PIECE : (r + 1) * _PIECE, c * _PIECE : (c + 1) * _PIECE
                        ]
                        plgpu.commit_smem()
                        plgpu.copy_smem_to_gmem(
                            staged.at[group, slot],
                            out.at[
                                pl.ds(first_row + r * _PIECE, _PIECE),
                                pl.ds(first_column + c * _PIECE, _PIECE),
                            ],
                        )
                    at = pl.ds(first_row, rows)
                    part = first_column // columns
                    plgpu.copy_smem_to_gmem(statistics.at[group, 0], sums.at[part, at])
                    plgpu.copy_smem_to_gmem(statistics.at[group, 1], tops.at[part, at])

            def body(_: Any, a: Any, b: Any, accumulator: Any) -> Any:
                plgpu.wgmma(accumulator, a.at[own_rows], b.at[own_columns].transpose((1, 0)))
                plgpu.wgmma_wait(0)
                return accumulator

            pipeline(body, compute)(
                hidden.at[pl.ds(row, block_rows), :],
                table.at[pl.ds(column, block_columns), :],
                allocations=buffers,
            )

        def _tiles() -> None:
            plgpu.nd_loop((counts[0] * counts[1],), collective_axes="block")(_tile)

        if wanted is None:
            _tiles()
        else:
            pl.when(wanted[0] != 0)(_tiles)

    plgpu.wait_smem_to_gmem(0, wait_read_only=False)
