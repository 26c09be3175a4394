"""The weights of a checkpoint on disk, an array or a slice at a time.

Orbax saves and restores whole trees. What converts a model from or to a foreign format never needs
more than one tensor in memory, so it works on the same files through TensorStore: each parameter is
a zarr array in Orbax's OCDBT database, under its path joined by dots.
"""

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path as FilePath
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from gemma_jax.buckets import absolute, is_remote
from gemma_jax.errors import UserError
from gemma_jax.hosts import fetch
from gemma_jax.training.checkpoint import FOLDER, weights_folder, write_errors

type Path = tuple[str, ...]
_CHUNK_BYTES = 16 << 20
_PIECE_BYTES = 1 << 28  # of an array that processes put together for its hash


class WeightsWriter:
    """Writes the one checkpoint of a model that was not trained here, as step 0."""

    def __init__(self, folder: FilePath, shapes: Any) -> None:
        """`shapes` is the parameter tree as shapes. The folder must not exist yet."""
        place = (folder / FOLDER).absolute()
        # Orbax describes the tree itself, from one with a single number a leaf; the arrays of the
        # real shapes then take the place of those.
        skeleton = jax.tree.map(lambda x: np.zeros((1,) * len(x.shape), x.dtype), shapes)
        with write_errors(folder), ocp.CheckpointManager(place) as manager:
            manager.save(0, args=ocp.args.Composite(params=ocp.args.StandardSave(skeleton)))
            manager.wait_until_finished()
        self._folder = folder
        self._base = place / "0" / "params"
        self._shapes = {_path(p): x for p, x in jax.tree.leaves_with_path(shapes)}
        self._open: dict[Path, Any] = {}

    def write(self, path: Path, start: int, stop: int, value: np.ndarray) -> None:
        """Rows [start, stop) of a parameter: of its first dimension, the layers of a stacked one.

        Returns when they are on disk. Each call makes files of its own, so few large ones are best.
        """
        with write_errors(self._folder):
            if path not in self._open:
                self._open[path] = _open(self._base, path, self._shapes[path])
            self._open[path][start:stop].write(np.ascontiguousarray(value)).result()


class SavedWeights:
    """The weights of a run folder, or of one of its checkpoints, read without loading them all."""

    def __init__(self, folder: FilePath, step: int | None = None) -> None:
        self._base = absolute(weights_folder(folder, step))
        self._open: dict[Path, Any] = {}

    def read(self, path: Path, layer: int | None, start: int, stop: int) -> np.ndarray:
        """float32 rows [start, stop) of a parameter, or all of one layer of a stacked one."""
        with self._damage():
            if path not in self._open:
                self._open[path] = _open(self._base, path, None)
            source = self._open[path]
            part = source[start:stop] if layer is None else source[layer]
            return np.asarray(part.read().result(), np.float32)

    @contextlib.contextmanager
    def _damage(self) -> Iterator[None]:
        try:
            yield
        except (ValueError, OSError) as error:
            raise UserError(
                f"the checkpoint {self._base.parent} is damaged; copy it again, or give another."
            ) from error


def weights_hash(
    tree: Any, read: Callable[[Path, None, int, int], np.ndarray] | None = None
) -> str:
    """SHA-256 over every parameter's path, shape and float32 bytes, in the order of the paths.

    `tree` holds arrays, or shapes whose values `read` gives one by one (`SavedWeights.read`).
    """
    digest = hashlib.sha256()
    leaves = [(jax.tree_util.keystr(p), _path(p), x) for p, x in jax.tree.leaves_with_path(tree)]
    for name, path, leaf in sorted(leaves, key=lambda entry: entry[0]):
        digest.update(f"{name} {leaf.shape}".encode())
        parts = _pieces(leaf) if read is None else [read(path, None, 0, leaf.shape[0])]
        for part in parts:
            digest.update(np.ascontiguousarray(part, np.float32).data)
    return digest.hexdigest()


def _pieces(value: jax.Array) -> Iterator[np.ndarray]:
    """An array on the host; where other processes hold parts of it, some rows at a time, so that
    none needs it whole."""
    if value.is_fully_addressable:
        yield jax.device_get(value)
        return
    rows = max(1, _PIECE_BYTES // max(1, value.nbytes // value.shape[0]))
    for start in range(0, value.shape[0], rows):
        yield fetch(value[start : start + rows])


def _path(path: tuple[Any, ...]) -> Path:
    return tuple(key.key for key in path)


def _open(base: FilePath, path: Path, new: Any) -> Any:
    """A parameter's array; `new` (a shape with a type) makes it."""
    root = f"{base}/" if is_remote(base) else f"file://{base}/"
    spec: dict[str, Any] = {
        "driver": "zarr",
        "kvstore": {"driver": "ocdbt", "base": root, "path": f"{'.'.join(path)}/"},
    }
    if new is None:
        return ts.open(spec, read=True).result()
    spec["metadata"] = {
        "shape": list(new.shape),
        "dtype": np.dtype(new.dtype).str,
        "chunks": _chunks(new.shape, np.dtype(new.dtype).itemsize),
        "compressor": {"id": "zstd", "level": 1},
    }
    return ts.open(spec, create=True, delete_existing=True, write=True, read=True).result()


def _chunks(shape: tuple[int, ...], itemsize: int) -> list[int]:
    """As many leading rows a chunk as fit."""
    rows = max(1, _CHUNK_BYTES // max(1, itemsize * math.prod(shape[1:])))
    return [min(rows, shape[0]), *shape[1:]]
