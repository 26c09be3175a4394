"""A file system that is away for a moment is waited for, by all that write and read."""

import errno
import os
import types
from pathlib import Path

import numpy as np
import pytest

from gemma_jax import files
from gemma_jax.data import record_file, token_set
from gemma_jax.data.record_file import RecordWriter
from gemma_jax.errors import UserError
from gemma_jax.files import Lines, read_json, write_json


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """Time passes by sleeping alone; gives how long was slept."""
    slept = []
    fake = types.SimpleNamespace(monotonic=lambda: sum(slept), sleep=slept.append)
    monkeypatch.setattr(files, "time", fake)
    return slept


def failing(call, times, error):
    """`call`, which fails the first `times`; None for always."""
    calls = []

    def sometimes(*arguments, **settings):
        calls.append(None)
        if times is None or len(calls) <= times:
            raise error
        return call(*arguments, **settings)

    return sometimes


EIO = OSError(errno.EIO, "Input/output error")


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN])
def test_writing_is_tried_again(tmp_path, monkeypatch, capsys, clock, number):
    monkeypatch.setattr(Path, "replace", failing(Path.replace, 4, OSError(number, "away")))
    write_json(tmp_path / "a.json", {"a": 1})
    assert clock == [1, 2, 4, 8]
    said = capsys.readouterr().err
    assert said == (
        f"cannot write {tmp_path}/a.json: {os.strerror(number)}; trying again for 120 seconds\n"
    )
    monkeypatch.setattr(Path, "read_text", failing(Path.read_text, 2, OSError(number, "away")))
    assert read_json(tmp_path / "a.json", "it") == {"a": 1}


def test_patience_ends_with_a_sentence(tmp_path, monkeypatch, clock):
    monkeypatch.setattr(Path, "replace", failing(Path.replace, None, EIO))
    with pytest.raises(UserError, match=r"a.json: Input/output error, for 1\d\d seconds; run the"):
        write_json(tmp_path / "a.json", {})
    assert 120 < sum(clock) < 150


def test_what_waiting_does_not_mend_is_told_at_once(tmp_path, monkeypatch, clock):
    full = OSError(errno.ENOSPC, "full")
    monkeypatch.setattr(Path, "replace", failing(Path.replace, None, full))
    with pytest.raises(UserError, match="the disk is full"):
        write_json(tmp_path / "a.json", {})
    assert clock == []


def test_a_read_only_folder_is_waited_for_if_it_was_none(tmp_path, monkeypatch, clock):
    read_only = OSError(errno.EROFS, "read-only")
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", failing(replace, 1, read_only))
    with pytest.raises(UserError, match="read-only; choose another folder"):
        write_json(tmp_path / "a.json", {})
    write_json(tmp_path / "a.json", {})
    monkeypatch.setattr(Path, "replace", failing(replace, 3, read_only))
    write_json(tmp_path / "b.json", {})
    assert clock == [1, 2, 4]


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (ValueError("NOT_FOUND ... [source locations] os_error_code='5' ..."), errno.EIO),
        (RuntimeError("write() failed: Input/output error; writing a"), errno.EIO),
        (RuntimeError("write() failed: No space left on device; writing a"), errno.ENOSPC),
        (RuntimeError("Invalid chunk"), None),
    ],
)
def test_errors_of_libraries_are_known_by_their_text(error, number):
    assert files.error_number(error) == number


def test_a_line_of_which_a_part_was_written_is_written_again(tmp_path, monkeypatch):
    lines = Lines(tmp_path / "lines", "0\n")
    lines.add("first\n")
    opened = Path.open

    def half(path, *arguments, **settings):
        with opened(path, "ab") as file:
            file.write(b"sec")
        monkeypatch.setattr(Path, "open", opened)
        raise EIO

    monkeypatch.setattr(Path, "open", half)
    lines.add("second\n")
    lines.sync()
    assert (tmp_path / "lines").read_text() == "0\nfirst\nsecond\n"


def test_records_are_written_again(tmp_path, monkeypatch):
    """As ArrayRecord tells of it: some were written, the rest are refused."""
    real = record_file.ArrayRecordWriter

    class Away:
        def __init__(self, path, options):
            self._writer, self._written = real(path, options), 0

        def write(self, content):
            self._written += 1
            if self._written == 3:
                self._writer.close()
                monkeypatch.setattr(record_file, "ArrayRecordWriter", real)
                raise RuntimeError("write() failed: Input/output error; writing x")
            self._writer.write(content)

        def close(self):
            pass

    monkeypatch.setattr(record_file, "ArrayRecordWriter", Away)
    writer = RecordWriter(tmp_path / "x.arrayrecord", "group_size:1")
    for number in range(5):
        writer.write(b"%d" % number)
    writer.finish()
    reader = record_file.ArrayRecordReader(str(tmp_path / "x.arrayrecord"), "")
    assert reader.read_all() == [b"0", b"1", b"2", b"3", b"4"]
    reader.close()


def test_documents_are_read_again(tmp_path, monkeypatch):
    path = tmp_path / "a.arrayrecord"
    writer = RecordWriter(path, "group_size:1,uncompressed")
    writer.write(np.array([2, 7, 1], "<u2").tobytes())
    writer.finish()
    (tmp_path / "a.lengths").write_bytes(np.array([3], "<u4").tobytes())
    shard = {"file": path.name, "lengths_file": "a.lengths", "documents": 1}
    shard["size"] = path.stat().st_size
    documents = token_set.Documents(tmp_path, [shard], np.dtype("<u2"))
    reader = token_set.array_record_module.ArrayRecordReader
    away = RuntimeError("read() failed: Stale file handle; reading a")
    monkeypatch.setattr(
        token_set.array_record_module, "ArrayRecordReader", failing(reader, 2, away)
    )
    assert documents[0].tolist() == [2, 7, 1]
    harmed = RuntimeError("Invalid chunk")
    monkeypatch.setattr(
        token_set.array_record_module, "ArrayRecordReader", failing(reader, None, harmed)
    )
    documents._open_readers()
    with pytest.raises(UserError, match="is damaged"):
        documents.read([0])
