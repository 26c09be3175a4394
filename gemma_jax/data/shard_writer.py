"""Writes the shards of a token set, and finds again what an interrupted build left whole.

A group is a stretch of documents of about `shard_bytes` of text; it becomes one shard a split.
The note `group-00000.json` is written last and makes the group count as done.
"""

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from gemma_jax import files
from gemma_jax.data.record_file import RecordWriter
from gemma_jax.data.token_set import SPLITS, token_dtype
from gemma_jax.data.tokenizer import BOS, EOS, Tokenizer
from gemma_jax.progress import Advance

_BATCH_BYTES = 4 << 20  # of text, tokenised at once
# One document a chunk, for random access. Not compressed: a training step reads two bytes a token,
# and unpacking them would cost more than fetching them.
_WRITER_OPTIONS = "group_size:1,uncompressed"

Document = tuple[str, int, str]  # text, UTF-8 bytes, split


def write_shards(
    folder: Path,
    documents: Iterator[Document],
    tokenizer: Tokenizer,
    *,
    shard_bytes: int,
    workers: int | None,
    advance: Advance,
) -> list[dict[str, Any]]:
    """Tokenises `documents` into shards under `folder` and returns the notes of all groups."""
    threads = workers or len(os.sched_getaffinity(0))
    notes: list[dict[str, Any]] = []
    group = _Peekable(documents)
    with ThreadPoolExecutor(1) as ahead:
        while group.has_more():
            number = len(notes)
            note = _finished(folder, number)
            if note is not None:
                for _, size, _ in group.take(shard_bytes):
                    advance(size, "kept from an earlier run")
            else:
                note = _write_group(
                    folder, number, group.take(shard_bytes), tokenizer, threads, ahead, advance
                )
            notes.append(note)
    return notes


def remove_notes(folder: Path) -> None:
    for path in folder.glob("group-*.json"):
        path.unlink()


class _Peekable:
    """Cuts a stream of documents into stretches of a given size."""

    def __init__(self, documents: Iterator[Document]):
        self._documents = documents
        self._next = next(documents, None)

    def has_more(self) -> bool:
        return self._next is not None

    def take(self, budget: int) -> Iterator[Document]:
        while self._next is not None and budget > 0:
            document = self._next
            budget -= document[1]
            self._next = next(self._documents, None)
            yield document


def _finished(folder: Path, number: int) -> dict[str, Any] | None:
    path = folder / f"group-{number:05d}.json"
    if not path.exists():
        return None
    note = files.read_json(path, "the note of a finished shard")
    for split in SPLITS:
        shard = note[split]
        if not shard["documents"]:
            continue
        for name, size in (
            (shard["file"], shard["size"]),
            (shard["lengths_file"], 4 * shard["documents"]),
        ):
            if not (folder / name).exists() or (folder / name).stat().st_size != size:
                return None
    return note


def _write_group(
    folder: Path,
    number: int,
    documents: Iterator[Document],
    tokenizer: Tokenizer,
    threads: int,
    ahead: ThreadPoolExecutor,
    advance: Advance,
) -> dict[str, Any]:
    shards = {split: _Shard(folder, f"{split}-{number:05d}", tokenizer) for split in SPLITS}
    waiting: tuple[list[Document], Future[list[list[int]]]] | None = None

    def write(batch: list[Document], encoded: list[list[int]]) -> None:
        for (_, size, split), ids in zip(batch, encoded, strict=True):
            shards[split].add(ids, size)
        advance(sum(size for _, size, _ in batch))

    for batch in _batches(documents):
        # The tokenizer works outside of Python's lock: read and write meanwhile.
        future = ahead.submit(tokenizer.encode_batch, [text for text, _, _ in batch], threads)
        if waiting is not None:
            write(waiting[0], waiting[1].result())
        waiting = (batch, future)
    if waiting is not None:
        write(waiting[0], waiting[1].result())
    note = {split: shard.finish() for split, shard in shards.items()}
    files.write_json(folder / f"group-{number:05d}.json", note)
    return note


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    held = 0
    for document in documents:
        batch.append(document)
        held += document[1]
        if held >= _BATCH_BYTES:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


class _Shard:
    """One shard being written; nothing is left on disk if it stays empty."""

    def __init__(self, folder: Path, name: str, tokenizer: Tokenizer):
        self._path = folder / f"{name}.arrayrecord"
        self._lengths_path = folder / f"{name}.lengths"
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._writer: RecordWriter | None = None
        self._lengths: list[int] = []
        self._bytes = 0

    def add(self, ids: list[int], size: int) -> None:
        if self._writer is None:
            self._writer = RecordWriter(self._path, _WRITER_OPTIONS)
        self._writer.write(np.array([BOS, *ids, EOS], self._dtype).tobytes())
        self._lengths.append(len(ids) + 2)
        self._bytes += size

    def finish(self) -> dict[str, Any]:
        counts = {
            "documents": len(self._lengths),
            "tokens": sum(self._lengths),
            "bytes": self._bytes,
        }
        if self._writer is None:
            return counts
        files.write_bytes(self._lengths_path, np.array(self._lengths, "<u4").tobytes())
        self._writer.finish()
        return {
            "file": self._path.name,
            "lengths_file": self._lengths_path.name,
            **counts,
            "size": self._path.stat().st_size,
            "sha256": files.file_hash(self._path),
        }
