"""NF4 with double quantisation (QLoRA, arXiv 2305.14314, section 3 and appendix E).

A matrix is laid out as [out, in] (as in PyTorch, so that blocks run along what is summed over) and
cut into blocks of 64 values. Each value becomes the index of the nearest of 16 levels, which are
quantiles of a normal distribution, after division by its block's largest magnitude. Those
magnitudes, less their mean, are quantised in turn, 256 to a block, to 8 bits of the dynamic type
(arXiv 2110.02861), as bitsandbytes does: 4.127 bits a value in all.
"""

import dataclasses
import functools
import math
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gemma_jax.model.matrix import Matrix

LEVELS = np.array(  # appendix E
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)
BLOCK, SCALE_BLOCK = 64, 256
_PIECE = 1 << 20  # values that a thread looks at at once


def _dynamic_levels() -> np.ndarray:
    """The 256 values of the signed dynamic type: 7 decades, one bit more of fraction in each.

    Rounded as the published code rounds them: each half of a decade's edges is counted from its
    own end with one rounding, all else in float32.
    """
    levels = [np.float32(0), np.float32(1)]
    first, last = np.float32(0.1), np.float32(1)
    for decade in range(7):
        count = 2**decade + 1
        step, i = np.float64((last - first) / np.float32(count - 1)), np.arange(count)
        edges = np.where(i < count // 2, first + step * i, last - step * (count - 1 - i))
        edges = edges.astype(np.float32)
        means = (edges[:-1] + edges[1:]) / np.float32(2) * np.float32(10.0 ** (decade - 6))
        levels += [*means, *-means]
    return np.sort(np.array(levels))


SCALE_LEVELS = _dynamic_levels()


class Packed(NamedTuple):
    """n values in NF4; arrays may have more dimensions in front.

    `codes` holds two values a byte, the first in the high half, the last block filled up;
    `scales` an index into SCALE_LEVELS a block; `scale_scales` the largest magnitude of each 256
    scales; `offset` the scales' mean.
    """

    codes: Any  # uint8 [blocks * 32]
    scales: Any  # uint8 [blocks]
    scale_scales: Any  # float32 [ceil(blocks / 256)]
    offset: Any  # float32 []


def quantise(values: np.ndarray) -> Packed:
    """Packs float32 values [n] in their order."""
    indices, magnitudes = _blockwise(np.ravel(values), LEVELS, BLOCK)
    offset = np.float32(magnitudes.mean(dtype=np.float64))
    scales, scale_scales = _blockwise(magnitudes - offset, SCALE_LEVELS, SCALE_BLOCK)
    codes = indices[0::2] << 4 | indices[1::2]
    return Packed(codes, scales[: len(magnitudes)], scale_scales, offset)


def dequantise(packed: Packed) -> Array:
    """float32 [..., blocks * 64]: the values, and zeros that fill up the last block."""
    blocks = packed.scales.shape[-1]
    scales = _magnitudes(packed.scales, _spread(packed.scale_scales, blocks), packed.offset)
    return _values(packed.codes, scales)


def _blockwise(values: np.ndarray, levels: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray]:
    """(uint8 index of the nearest level of each value over its block's magnitude, magnitudes)."""
    padded = np.zeros(-(-len(values) // block) * block, np.float32)
    padded[: len(values)] = values
    blocks = padded.reshape(-1, block)
    magnitudes = np.abs(blocks).max(axis=1)
    indices = np.empty(blocks.shape, np.uint8)
    with np.errstate(divide="ignore"):
        factors = np.where(magnitudes > 0, np.float32(1) / magnitudes, np.float32(0))

    def look(start: int) -> None:
        part = slice(start, start + _PIECE // block)
        indices[part] = _nearest(np.clip(blocks[part] * factors[part, None], -1, 1), levels)

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # NumPy lets go of the interpreter
        list(pool.map(look, range(0, len(blocks), _PIECE // block)))
    return indices.ravel(), magnitudes


def _nearest(x: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """The index of the nearest level; the lower one of two that are as near."""
    above = np.clip(np.searchsorted(levels, x), 1, len(levels) - 1)
    return np.where(x - levels[above - 1] <= levels[above] - x, above - 1, above).astype(np.uint8)


def _spread(scale_scales: Any, blocks: int) -> Any:
    return jnp.repeat(scale_scales, SCALE_BLOCK, axis=-1)[..., :blocks]


def _magnitudes(scales: Any, scale_scales: Any, offset: Any) -> Any:
    product = jnp.asarray(SCALE_LEVELS)[scales] * scale_scales
    # Kept from becoming one operation with the sum, which would round once instead of twice.
    return jax.lax.optimization_barrier(product) + jnp.asarray(offset)[..., None]


def _values(codes: Any, magnitudes: Any) -> Any:
    """Two values a byte, each times the magnitude of its block."""
    codes = jnp.asarray(codes)
    pairs = jnp.stack([codes >> 4, codes & 15], axis=-1).reshape(*magnitudes.shape, BLOCK)
    values = jnp.asarray(LEVELS)[pairs] * magnitudes[..., None]
    return values.reshape(*magnitudes.shape[:-1], -1)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["packed"],
    meta_fields=["shape", "inputs", "dtype"],
)
@dataclasses.dataclass(frozen=True)
class Nf4(Matrix):
    """A frozen matrix in NF4, dequantised where it is used, in the backward pass anew.

    `shape` is that of the matrix [in..., out...] without stacked layers; `inputs` counts its input
    dimensions, 0 for a table [V, D].
    """

    packed: Packed
    shape: tuple[int, ...]
    inputs: int
    dtype: Any = jnp.float32

    def astype(self, dtype: Any) -> "Nf4":
        return dataclasses.replace(self, dtype=jnp.dtype(dtype))

    def multiply(self, x: Array, inputs: int) -> Array:
        assert inputs == self.inputs

        @jax.checkpoint
        def product(own: Nf4, x: Array) -> Array:
            flat = x.reshape(*x.shape[: x.ndim - inputs], -1)
            y = jnp.einsum("...I,OI->...O", flat, own._foreign())
            return y.reshape(*y.shape[:-1], *self.shape[inputs:])

        return product(self, x)

    def lookup(self, ids: Array) -> Array:
        width = self.shape[1]
        if width % BLOCK:
            return self.array()[ids]
        V, per_row = self.shape[0], width // BLOCK
        blocks = ids[..., None] * per_row + jnp.arange(per_row, dtype=ids.dtype)
        magnitudes = _magnitudes(
            self.packed.scales.reshape(V, per_row)[ids],
            self.packed.scale_scales[blocks // SCALE_BLOCK],
            self.packed.offset,
        )
        return _values(self.packed.codes.reshape(V, -1)[ids], magnitudes).astype(self.dtype)

    def scores(self, x: Array) -> Array:
        return jnp.einsum("...D,VD->...V", x, self.array(), preferred_element_type=jnp.float32)

    def whole(self, stacked: bool) -> Array:
        """The array, of all layers where it is `stacked` (as it is outside of a scan)."""
        return jax.vmap(Nf4.array)(self) if stacked else self.array()

    def array(self) -> Array:
        own = self._foreign()
        return own.T.reshape(self.shape) if self.inputs else own

    def _foreign(self) -> Array:
        """[out, in], as it is packed; a table [V, D]."""
        flat = dequantise(self.packed)[: math.prod(self.shape)].astype(self.dtype)
        width = math.prod(self.shape[: self.inputs]) if self.inputs else self.shape[1]
        return flat.reshape(-1, width)


def pack(value: np.ndarray, inputs: int, *, stacked: bool) -> Nf4:
    """A float32 parameter of ours in NF4; the layers of a stacked one are packed each by itself."""
    layers = value if stacked else value[None]
    shape = layers.shape[1:]
    foreign = layers
    if inputs:
        foreign = layers.reshape(len(layers), math.prod(shape[:inputs]), -1).swapaxes(1, 2)
    parts = [quantise(np.ascontiguousarray(layer)) for layer in foreign]
    packed = Packed(*(np.stack(column) for column in zip(*parts, strict=True)))
    if not stacked:
        packed = Packed(*(column[0] for column in packed))
    return Nf4(packed, shape, inputs)
