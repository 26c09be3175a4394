"""The real Gemma 3, where GEMMA_JAX_REAL names a folder with its files (see goldens/README.md)."""

import os
import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest

FOLDER = os.environ.get("GEMMA_JAX_REAL")
needs_real = [
    pytest.mark.real,
    pytest.mark.skipif(not FOLDER, reason="GEMMA_JAX_REAL names no folder"),
]
_NUMBERS = dict(enumerate(["u1", "i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?"])) | {
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_STRING, _ARRAY = 8, 9


def path(name: str) -> Path:
    return Path(FOLDER or "") / name


def gguf_metadata(file_path: Path) -> dict[str, Any]:
    with file_path.open("rb") as file:
        magic, _, _, count = struct.unpack("<4sIQQ", file.read(24))
        assert magic == b"GGUF"
        return {_text(file): _value(file, _u4(file)) for _ in range(count)}


def _u4(file: BinaryIO) -> int:
    return struct.unpack("<I", file.read(4))[0]


def _text(file: BinaryIO) -> str:
    return file.read(struct.unpack("<Q", file.read(8))[0]).decode()


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _text(file)
    if kind != _ARRAY:
        return _numbers(file, kind, 1)[0].item()
    kind, count = struct.unpack("<IQ", file.read(12))
    if kind == _STRING:
        return [_text(file) for _ in range(count)]
    return _numbers(file, kind, count)


def _numbers(file: BinaryIO, kind: int, count: int) -> np.ndarray:
    dtype = np.dtype(_NUMBERS[kind])
    return np.frombuffer(file.read(dtype.itemsize * count), dtype)
