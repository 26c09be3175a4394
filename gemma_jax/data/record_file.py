"""ArrayRecord files that are either whole or absent, on a full disk as well."""

import os
from pathlib import Path

from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from gemma_jax.errors import UserError
from gemma_jax.files import PARTIAL_SUFFIX, disk_errors, error_number, patiently


class RecordWriter:
    """Takes the records of a file, and writes them all when it is finished: so the writing can be
    done again where the file system was away."""

    def __init__(self, path: Path, options: str) -> None:
        self.path = path
        self._aside = path.with_name(path.name + PARTIAL_SUFFIX)
        self._options = options
        self._records: list[bytes] = []
        with disk_errors(path):
            patiently(lambda: self._aside.open("wb").close(), path)

    def write(self, content: bytes) -> None:
        self._records.append(content)

    def finish(self) -> None:
        """Raises UserError where the disk did not take everything."""
        with disk_errors(self.path):
            patiently(self._write, self.path)
        self._records = []

    def _write(self) -> None:
        failure = None
        writer = ArrayRecordWriter(str(self._aside), self._options)
        try:
            for content in self._records:
                writer.write(content)
        except RuntimeError as error:  # told now or at a later call: one count at the end tells
            failure = error
        try:
            writer.close()
        except RuntimeError as error:
            failure = failure or error
        if _num_records(self._aside) != len(self._records):
            number = None if failure is None else error_number(failure)
            if number is not None:
                raise OSError(number, os.strerror(number)) from failure
            raise UserError(
                f"cannot write {self.path}: the disk did not take all of it; free some space and "
                "run the same command again, it goes on where it stopped."
            )
        descriptor = os.open(self._aside, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        self._aside.replace(self.path)


def _num_records(file: Path) -> int:
    try:
        reader = ArrayRecordReader(str(file), "readahead_buffer_size:0")
        try:
            return reader.num_records()
        finally:
            reader.close()
    except RuntimeError:
        return -1
