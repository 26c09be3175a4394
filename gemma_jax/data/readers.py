"""Readers of the kinds of files that documents come from.

Each gives texts in a fixed order as they are asked for, and refuses what is damaged, not UTF-8 or
without text with the file, the place and the mend.
"""

import bz2
import codecs
import gzip
import io
import json
import lzma
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from gemma_jax.errors import UserError

MAX_DOCUMENT_CHARS = 1 << 20
_SKIPPED_STDLIB = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_READ_BYTES = 1 << 18


class _ZstdFile(io.RawIOBase):
    """Decompresses frame after frame. Unlike the package's own reader it tells a file that was cut
    short from one that has ended."""

    def __init__(self, path: Path):
        self._file = path.open("rb")
        self._frame: Any = None
        self._out = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._out:
            block = self._file.read(_READ_BYTES)
            if self._frame is not None and self._frame.eof:
                block, self._frame = self._frame.unused_data + block, None
            if not block:
                if self._frame is not None:
                    raise EOFError("the last frame has no end")
                return 0
            self._frame = self._frame or zstandard.ZstdDecompressor().decompressobj()
            self._out = memoryview(self._frame.decompress(block))
        count = min(len(buffer), len(self._out))
        buffer[:count] = self._out[:count]
        self._out = self._out[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


OPENERS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".xz": lzma.open,
    ".bz2": bz2.open,
    ".zst": _ZstdFile,
}


class reading:  # noqa: N801 - used as a statement
    """Turns an unreadable or damaged file into one sentence."""

    def __init__(self, name: str):
        self.name = name

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, PermissionError):
            raise UserError(f"{self.name} may not be read; change its permissions.") from error
        if isinstance(error, FileNotFoundError):
            raise UserError(f"{self.name} has gone since the sources were listed.") from error
        damaged = (EOFError, lzma.LZMAError, zlib.error, zstandard.ZstdError, gzip.BadGzipFile)
        if isinstance(error, damaged) or (isinstance(error, OSError) and error.errno is None):
            raise UserError(
                f"{self.name} is damaged or cut short ({error}); copy it again."
            ) from error


def _open(name: str) -> BinaryIO:
    opener = OPENERS.get(Path(name).suffix.lower())
    return io.BufferedReader(opener(Path(name))) if opener else open(name, "rb")


def text_blocks(name: str) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    before = 0  # bytes ahead of what the decoder holds
    with reading(name), _open(name) as file:
        while True:
            block = file.read(_READ_BYTES)
            pending = len(decoder.getstate()[0])
            try:
                yield decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{name} is not UTF-8 at byte {before - pending + error.start} "
                    f"(0x{error.object[error.start]:02x}); convert it, for example with "
                    "`iconv -f latin1 -t utf-8`, or leave it out."
                ) from None
            if not block:
                return
            before += len(block)


_RENAME = "give the right name as --text-field, or as text_field of a Corpus"


class _TwiceError(ValueError):
    """A name that an object has twice."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise _TwiceError(next(name for name in names if names.count(name) > 1))
    return row


def json_rows(name: str, *, once: bool = False) -> Iterator[tuple[str, Any]]:
    """("FILE line N", value) of each line of JSON lines that is not blank.

    Of a name that an object has twice JSON keeps the last value; with `once` it is refused.
    """
    hook = _object if once else None
    with reading(name), _open(name) as file:
        for number, line in enumerate(file, start=1):
            if line.isspace():
                continue
            place = f"{name} line {number}"
            try:
                row = json.loads(line, object_pairs_hook=hook)
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{place} is not UTF-8 at byte {error.start} of the line; convert the file or "
                    "remove the line."
                ) from None
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{place} is not JSON ({error.msg}, column {error.colno}); mend or remove it."
                ) from None
            except _TwiceError as error:
                raise UserError(f"{place} has '{error}' twice in one object; remove one.") from None
            except (ValueError, RecursionError):  # both bound what a line may ask for
                raise UserError(
                    f"{place} holds a number of thousands of digits, or is nested too deeply; "
                    "mend or remove it."
                ) from None
            yield place, row


def json_texts(name: str, text_field: str) -> Iterator[str]:
    for place, row in json_rows(name):
        text = row.get(text_field) if isinstance(row, dict) else None
        if not isinstance(text, str):
            has = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            raise UserError(f'{place} has no text under "{text_field}" (it has: {has}); {_RENAME}.')
        yield from _checked([text], place)


def parquet_texts(name: str, text_field: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    with reading(name):
        try:
            table = pyarrow.parquet.ParquetFile(name)
            if text_field not in table.schema_arrow.names:
                raise UserError(
                    f'{name} has no column "{text_field}" (it has: '
                    f"{', '.join(table.schema_arrow.names)}); {_RENAME}."
                )
            for batch in table.iter_batches(batch_size=256, columns=[text_field]):
                yield from _checked(batch.column(0).to_pylist(), name)
        except pyarrow.ArrowInvalid as error:
            raise UserError(f"{name} is not a sound Parquet file; copy it again.") from error


def hf_dataset(source: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise UserError(
            f'{source} needs the package "datasets"; start with `GEMMA_JAX_EXTRA=cpu,hf '
            "./launch.sh ...` (cuda or tpu for cpu where it is one)."
        ) from None
    name, *rest = source.removeprefix("hf:").split(":")
    if len(rest) > 2:
        raise UserError(f"{source} has too many parts; write hf:NAME[:CONFIG][:SPLIT].")
    split, config = rest[-1] if rest else "train", rest[0] if len(rest) == 2 else None
    try:
        if not Path(name).is_dir():
            return datasets.load_dataset(name, config, split=split)
        try:
            loaded = datasets.load_from_disk(name)
        except FileNotFoundError:  # nothing that `save_to_disk` wrote: a copy of a repository
            return datasets.load_dataset(name, config, split=split)
    except Exception as error:  # the package raises dozens of kinds, all of them about its input
        message = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{source} cannot be loaded ({message}); check its name.") from error
    if not isinstance(loaded, datasets.DatasetDict):
        if rest and str(loaded.split) != split:
            raise UserError(
                f'{source} asks for the split "{split}" of a folder that holds one dataset alone '
                f"(split: {loaded.split}); write hf:{name}."
            )
        return loaded
    if split not in loaded:
        raise UserError(f'{source} has no split "{split}" (it has: {", ".join(loaded)}).')
    return loaded[split]


def hf_texts(name: str, text_field: str) -> Iterator[str]:
    dataset = hf_dataset(name)
    if text_field not in dataset.column_names:
        raise UserError(
            f'{name} has no column "{text_field}" (it has: {", ".join(dataset.column_names)}); '
            f"{_RENAME}."
        )
    rows = dataset.select_columns([text_field])
    yield from _checked((row[text_field] for row in rows), name)


def stdlib_texts() -> Iterator[str]:
    root = Path(sysconfig.get_path("stdlib"))
    found = 0
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        parts = set(path.relative_to(root).parts)
        if parts & _SKIPPED_STDLIB or path.parent.name == "pydoc_data":
            continue
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue  # a handful declare another encoding, to show that one can
        found += 1
        yield text
    if found < 10:
        raise UserError(
            f"this Python has no standard library sources under {root}; give text files as source."
        )
    try:
        from pydoc_data import topics
    except ImportError:
        return
    yield from (text for _, text in sorted(topics.topics.items()))


def _checked(texts: Iterable[Any], place: str) -> Iterator[str]:
    """Passes on what is text; None counts as empty."""
    for number, text in enumerate(texts):
        if text is None:
            continue
        if not isinstance(text, str):
            raise UserError(f"{place} holds {type(text).__name__} in place of text (row {number}).")
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise UserError(
                    f"{place} holds half a surrogate pair at character {error.start}, which is no "
                    "Unicode text; remove it."
                ) from None
        yield text


def cut(blocks: Iterable[str]) -> Iterator[str]:
    """Joins the blocks of one text and cuts it where it grows beyond MAX_DOCUMENT_CHARS."""
    held = ""
    for block in blocks:
        held += block
        while len(held) > MAX_DOCUMENT_CHARS:
            end = held.rfind("\n", 0, MAX_DOCUMENT_CHARS) + 1 or MAX_DOCUMENT_CHARS
            yield held[:end]
            held = held[end:]
    if held:
        yield held
