"""ArrayRecord files that are either whole or absent, on a full disk as well."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from gemma_jax.errors import UserError
from gemma_jax.files import PARTIAL_SUFFIX, disk_errors


class RecordWriter:
    """Writes records aside; `finish` gives the file its name, `close` alone leaves a part of it."""

    def __init__(self, path: Path, options: str) -> None:
        self.path = path
        self._aside = path.with_name(path.name + PARTIAL_SUFFIX)
        with disk_errors(path):
            self._aside.open("wb").close()
        self._writer = ArrayRecordWriter(str(self._aside), options)
        self._written = 0

    def write(self, content: bytes) -> None:
        _ignoring_disk(self._writer.write, content)
        self._written += 1

    def close(self) -> None:
        if self._writer is not None:
            _ignoring_disk(self._writer.close)
        self._writer = None

    def finish(self) -> None:
        """Raises UserError where the disk did not take everything."""
        self.close()
        if _num_records(self._aside) != self._written:
            raise UserError(
                f"cannot write {self.path}: the disk did not take all of it; free some space and "
                "run the same command again, it goes on where it stopped."
            )
        with disk_errors(self.path):
            descriptor = os.open(self._aside, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
            self._aside.replace(self.path)


def _ignoring_disk(call: Callable[..., Any], *args: Any) -> None:
    """ArrayRecord reports a failed write now or at a later call: one count at the end tells."""
    try:
        call(*args)
    except RuntimeError:
        return


def _num_records(file: Path) -> int:
    try:
        reader = ArrayRecordReader(str(file), "readahead_buffer_size:0")
        try:
            return reader.num_records()
        finally:
            reader.close()
    except RuntimeError:
        return -1
