"""The tensors of Hugging Face folders: one safetensors file or several with an index."""

import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from gemma_jax.errors import UserError
from gemma_jax.files import disk_errors, read_json
from gemma_jax.interop.names import Weight

INDEX = "model.safetensors.index.json"
# The text half of a multimodal model under today's names and those before transformers 4.52.
_TEXT_PREFIXES = ("model.language_model.", "language_model.model.")
_DTYPES: dict[str, tuple[str, np.dtype]] = {
    "f32": ("F32", np.dtype("<f4")),
    "bf16": ("BF16", np.dtype(ml_dtypes.bfloat16)),
    "f16": ("F16", np.dtype("<f2")),
}
DTYPES = tuple(_DTYPES)
_FILE_BYTES = 4 << 30  # a new safetensors file is begun beyond this


class HfTensors:
    """The text model's tensors of a folder, under the names of a text-only one."""

    def __init__(self, folder: Path, *, multimodal: bool, tied: bool) -> None:
        self.where = str(folder)
        self._places: dict[str, tuple[Path, str]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for file in _files(folder):
            self._add(file, multimodal)
        if tied:  # some writers repeat the embedding under the head's name
            self._shapes.pop("lm_head.weight", None)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        file, there = self._places[name]
        # Opened anew for each tensor: pages of an open mapping would count as memory in use.
        with _opened(file) as tensors:
            part = tensors.get_slice(there)
            if part.get_dtype() not in ("F32", "F16", "BF16", "F64"):
                raise UserError(
                    f"tensor {there} of {file} is of the type {part.get_dtype()}; only floating "
                    "point can be imported."
                )
            return np.asarray(part[start:stop], np.float32)

    def _add(self, file: Path, multimodal: bool) -> None:
        with _opened(file) as tensors:
            for there in list(tensors.keys()):
                name = _text_name(there) if multimodal else there
                if name is None:
                    continue
                if name in self._places:
                    raise UserError(
                        f"tensor {there} lies both in {self._places[name][0]} and in {file}; fetch "
                        "the folder again."
                    )
                self._places[name] = file, there
                self._shapes[name] = tuple(tensors.get_slice(there).get_shape())


def _text_name(name: str) -> str | None:
    """A multimodal model's name as that of a text-only one, None for the rest of it."""
    for prefix in _TEXT_PREFIXES:
        if name.startswith(prefix):
            return "model." + name.removeprefix(prefix)
    return "lm_head.weight" if name.endswith("lm_head.weight") else None


def _files(folder: Path) -> list[Path]:
    if not (folder / INDEX).exists():
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise UserError(
                f"{folder} has no *.safetensors file; give the folder of a whole model."
            )
        return files
    index = read_json(folder / INDEX, "the index of a model's files")
    try:
        names = sorted(set(index["weight_map"].values()))
        if any(Path(name).name != name for name in names):
            raise ValueError("a file outside of the folder")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(
            f"{folder / INDEX} is no index of files: {error}; fetch it again."
        ) from None
    for name in names:
        if not (folder / name).exists():
            raise UserError(f"{folder / name} is missing, which {INDEX} names; fetch it again.")
    return [folder / name for name in names]


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, "np")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is no whole safetensors file ({error}); fetch it again.") from None


def write_tensors(
    folder: Path,
    weights: Sequence[Weight],
    read: Callable[[Weight], Iterator[np.ndarray]],
    dtype: str,
) -> None:
    """Writes `weights` to safetensors, a piece at a time; `read` yields a tensor's rows in order.

    One file, or several with an index where they hold more than 4 GiB.
    """
    name, kind = _DTYPES[dtype]
    parts: list[list[Weight]] = [[]]
    sizes = [0]
    for weight in weights:
        size = int(np.prod(weight.foreign_shape)) * kind.itemsize
        if parts[-1] and sizes[-1] + size > _FILE_BYTES:
            parts.append([])
            sizes.append(0)
        parts[-1].append(weight)
        sizes[-1] += size
    files = ["model.safetensors"]
    if len(parts) > 1:
        files = [f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors" for i in range(len(parts))]
        places = {w.hf: file for file, part in zip(files, parts, strict=True) for w in part}
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    for file, part in zip(files, parts, strict=True):
        with disk_errors(folder / file), (folder / file).open("wb") as out:
            out.write(_header(part, name, kind.itemsize))
            for weight in part:
                for rows in read(weight):
                    out.write(np.ascontiguousarray(rows.astype(kind)).view(np.uint8).data)
            out.flush()
            os.fsync(out.fileno())


def _header(weights: Sequence[Weight], dtype: str, itemsize: int) -> bytes:
    """8 bytes of length, then JSON, padded so that the data begin at a multiple of 8."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for weight in weights:
        end = offset + int(np.prod(weight.foreign_shape)) * itemsize
        shape = list(weight.foreign_shape)
        entries[weight.hf] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
