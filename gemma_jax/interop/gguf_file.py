"""The GGUF container (version 3), read with every length checked, and written in one pass.

Layout: magic, version, counts; metadata (key, type, value); for each tensor its name, dimensions
(fastest first), type and offset; padding to `general.alignment`; the tensors' data. Source: ggml
`docs/gguf.md`. What a type of block means is the `gguf` package's knowledge.
"""

import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from gemma_jax.errors import UserError
from gemma_jax.files import disk_errors

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
_MAX_DIMS = 4

_NUMBERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?"}
_NUMBERS |= {10: "<Q", 11: "<q", 12: "<d"}
_UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY, _UINT64 = 4, 5, 6, 7, 8, 9, 10


@dataclass(frozen=True)
class TensorInfo:
    """`shape` has rows first, as everywhere here; the file says it the other way round."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    offset: int = 0

    @property
    def row_bytes(self) -> int:
        return tensor_bytes(self.shape[-1:], self.type)

    @property
    def rows(self) -> int:
        return int(np.prod(self.shape[:-1], dtype=object)) if len(self.shape) > 1 else 1

    @property
    def num_bytes(self) -> int:
        return self.rows * self.row_bytes


def tensor_bytes(shape: Sequence[int], kind: GGMLQuantizationType) -> int:
    block, size = GGML_QUANT_SIZES[kind]
    return int(np.prod(shape, dtype=object)) // block * size


class GgufFile:
    """Metadata in `fields`, tensors by name through `shapes` and `read`.

    Nothing is believed before it is compared with the size of the file, so a header that lies is
    refused in memory no larger than the file's own metadata.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.where = path, str(path)
        try:
            self._size = path.stat().st_size
            with path.open("rb") as file:
                self._file = file
                self._parse()
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}; give a GGUF file.") from None
        except (struct.error, UnicodeDecodeError, ValueError) as error:
            raise self._broken(str(error)) from None

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: info.shape for name, info in self.tensors.items()}

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) in float32; of a vector, its elements."""
        info = self.tensors[name]
        first, last = (start, stop) if len(info.shape) > 1 else (0, 1)
        with self.path.open("rb") as file:
            file.seek(info.offset + first * info.row_bytes)
            data = np.fromfile(file, np.uint8, (last - first) * info.row_bytes)
        if data.size != (last - first) * info.row_bytes:
            raise self._broken(f"tensor {name} ends early")
        try:
            values = dequantize(data.reshape(last - first, info.row_bytes), info.type)
        except NotImplementedError:
            raise UserError(
                f"tensor {name} of {self.path} is of the type {info.type.name}, which the gguf "
                "package cannot dequantise; give a file of another type."
            ) from None
        values = np.asarray(values, np.float32)
        return values if len(info.shape) > 1 else values.reshape(-1)[start:stop]

    def _broken(self, how: str) -> UserError:
        return UserError(f"{self.path} is no whole GGUF file: {how}; fetch it again.")

    def _parse(self) -> None:
        if self._take(4) != MAGIC:
            raise ValueError("it does not begin with the mark GGUF")
        version = self._number(_UINT32)
        if version not in (2, VERSION):
            raise ValueError(f"it has version {version}, and 2 and 3 are known")
        num_tensors, num_fields = self._number(_UINT64), self._number(_UINT64)
        self._check_count(num_tensors, 24, "tensors")
        self._check_count(num_fields, 13, "metadata fields")
        self.fields: dict[str, Any] = {}
        for _ in range(num_fields):
            key = self._string("a metadata key")
            if key in self.fields:
                raise ValueError(f"metadata {key} comes twice")
            self.fields[key] = self._value(self._number(_UINT32), key)
        alignment = self.fields.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 8 or alignment % 8:
            raise ValueError(f"general.alignment is {alignment!r}")
        infos = [self._info() for _ in range(num_tensors)]
        data = -(-self._file.tell() // alignment) * alignment
        self.tensors: dict[str, TensorInfo] = {}
        for info in infos:
            if info.name in self.tensors:
                raise ValueError(f"tensor {info.name} comes twice")
            place = data + info.offset
            if info.offset % alignment or place + info.num_bytes > self._size:
                raise ValueError(
                    f"tensor {info.name} of {info.num_bytes} bytes at {place} lies outside of its "
                    f"{self._size} bytes"
                )
            self.tensors[info.name] = TensorInfo(info.name, info.shape, info.type, place)

    def _info(self) -> TensorInfo:
        name = self._string("a tensor's name")
        num_dims = self._number(_UINT32)
        if not 1 <= num_dims <= _MAX_DIMS:
            raise ValueError(f"tensor {name} has {num_dims} dimensions")
        shape = tuple(self._number(_UINT64) for _ in range(num_dims))[::-1]
        number, offset = self._number(_UINT32), self._number(_UINT64)
        try:
            kind = GGMLQuantizationType(number)
            block, _ = GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError):
            raise ValueError(f"tensor {name} is of the unknown type {number}") from None
        if 0 in shape or shape[-1] % block:
            raise ValueError(f"tensor {name} of shape {shape} does not fit its type {kind.name}")
        return TensorInfo(name, shape, kind, offset)

    def _value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self._string(key)
        if kind in _NUMBERS:
            return self._number(kind)
        if kind != _ARRAY:
            raise ValueError(f"metadata {key} is of the unknown type {kind}")
        item, count = self._number(_UINT32), self._number(_UINT64)
        if item == _STRING:
            self._check_count(count, 8, f"strings in {key}")
            return [self._string(key) for _ in range(count)]
        if item not in _NUMBERS:
            raise ValueError(f"metadata {key} holds the type {item} in an array")
        dtype = np.dtype(_NUMBERS[item])
        self._check_count(count, dtype.itemsize, f"numbers in {key}")
        return np.frombuffer(self._take(count * dtype.itemsize), dtype)

    def _number(self, kind: int) -> Any:
        form = _NUMBERS[kind]
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _string(self, what: str) -> str:
        length = self._number(_UINT64)
        self._check_count(length, 1, f"bytes in {what}")
        return self._take(length).decode()

    def _check_count(self, count: int, least: int, what: str) -> None:
        left = self._size - self._file.tell()
        if count * least > left:
            raise ValueError(f"it claims {count} {what} where {left} bytes are left")

    def _take(self, count: int) -> bytes:
        content = self._file.read(count)
        if len(content) != count:
            raise ValueError("it ends early")
        return content


def write_gguf(
    path: Path,
    fields: Mapping[str, Any],
    tensors: Sequence[TensorInfo],
    data: Iterable[tuple[str, Iterable[bytes | memoryview]]],
) -> None:
    """Writes a file in one pass; `data` gives each tensor's bytes in pieces, in order.

    Numbers in `fields` become uint32 or float32, arrays keep NumPy's type, lists hold strings or
    booleans.
    """
    head = bytearray(MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(fields)))
    for key, value in fields.items():
        head += _packed_string(key) + _packed(value)
    offset = 0
    for info in tensors:
        head += _packed_string(info.name) + struct.pack("<I", len(info.shape))
        head += struct.pack(f"<{len(info.shape)}Q", *info.shape[::-1])
        head += struct.pack("<IQ", info.type, offset)
        offset += -(-info.num_bytes // ALIGNMENT) * ALIGNMENT
    with disk_errors(path), path.open("wb") as file:
        file.write(head)
        _pad(file)
        for info, (name, parts) in zip(tensors, data, strict=True):
            written = sum(file.write(part) for part in parts)
            if (name, written) != (info.name, info.num_bytes):
                raise RuntimeError(f"{written} bytes of {name} for {info}")
            _pad(file)
        file.flush()
        os.fsync(file.fileno())


def _pad(file: BinaryIO) -> None:
    file.write(b"\0" * (-file.tell() % ALIGNMENT))


def _packed_string(text: str) -> bytes:
    content = text.encode()
    return struct.pack("<Q", len(content)) + content


def _packed(value: Any) -> bytes:
    """A metadata value with its type in front."""
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _packed_string(value)
    if isinstance(value, bool):
        return struct.pack("<I?", _BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", _UINT32, value)
    if isinstance(value, float):
        return struct.pack("<If", _FLOAT32, value)
    if isinstance(value, np.ndarray):
        kind = {np.dtype("i4"): _INT32, np.dtype("f4"): _FLOAT32, np.dtype("u4"): _UINT32}[
            value.dtype
        ]
        return struct.pack("<IIQ", _ARRAY, kind, len(value)) + value.tobytes()
    if value and isinstance(value[0], bool):
        return struct.pack("<IIQ", _ARRAY, _BOOL, len(value)) + bytes(value)
    return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(map(_packed_string, value))
