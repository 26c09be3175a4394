"""Writing teacher shards so that a job may be killed at any moment.

Each file is written aside and renamed when whole: a killed job leaves finished shards and perhaps
one `.partial`, which the next run writes again. Totals and the token hash are taken from the
records themselves, of this run and of earlier ones alike, so that the manifest does not depend on
interruptions.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gemma_jax.data.record_file import RecordWriter
from gemma_jax.distill.records import decode_record
from gemma_jax.distill.shards import (
    FORMAT,
    JOB,
    MANIFEST,
    VERSION,
    ShardFile,
    ShardsDescription,
    Totals,
)
from gemma_jax.errors import UserError
from gemma_jax.files import file_hash, read_json, write_json


class ShardsWriter:
    """Writes the shards of one folder in order, or takes over those that are already there.

    `write` or `adopt` is called once for each shard, in order, then `finish`.
    """

    def __init__(self, path: str | Path, description: ShardsDescription) -> None:
        self.path = Path(path)
        self.description = description
        self._names = description.shard_names()
        self._shards: list[dict[str, Any]] = []
        self._totals = Totals()
        wanted = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(description)}
        if not check_begun(self.path, wanted):
            write_json(self.path / JOB, wanted)

    def is_written(self, shard: int) -> bool:
        return (self.path / self._names[shard]).exists()

    def is_complete(self) -> bool:
        return all(map(self.is_written, range(len(self._names))))

    def write(self, shard: int, records: Iterable[bytes]) -> None:
        """Writes all records of one shard: the file is there whole or not at all."""
        file = self.path / self._names[shard]
        writer = RecordWriter(file, "group_size:1")
        written = 0
        for content in records:
            self._totals.add(decode_record(content))
            writer.write(content)
            written += 1
        if written != len(self.description.shard_range(shard)):
            raise ValueError(f"{file} was given {written} records")
        writer.finish()
        self._note(file, written)

    def adopt(self, shard: int, sequences: Iterable[dict[str, np.ndarray]]) -> None:
        """Takes over a finished shard, checked against the sequences that it stands for."""
        file = self.path / self._names[shard]
        indices = self.description.shard_range(shard)
        reader = ShardFile(file, len(indices))
        for place, (index, sequence) in enumerate(zip(indices, sequences, strict=True)):
            record = reader.record(place)
            if record.record_index != index or not np.array_equal(
                record.tokens, sequence["tokens"]
            ):
                raise UserError(
                    f"record {place} of {file} holds another sequence than the data give now; "
                    "choose another folder, or go on with the old data."
                )
            self._totals.add(record)
        self._note(file, len(indices))

    def finish(self) -> dict[str, Any]:
        """Writes the manifest and returns it."""
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            **dataclasses.asdict(self.description),
            **self._totals.fields(),
            "bytes": sum(shard["bytes"] for shard in self._shards),
            "shards": self._shards,
        }
        write_json(self.path / MANIFEST, manifest)
        return manifest

    def _note(self, file: Path, records: int) -> None:
        self._shards.append(
            {
                "name": file.name,
                "records": records,
                "bytes": file.stat().st_size,
                "sha256": file_hash(file),
            }
        )


def check_begun(path: Path, wanted: Mapping[str, Any]) -> bool:
    """Whether the folder was begun; refuses one that was begun with other values."""
    if not (path / JOB).exists():
        if any(path.glob("*.arrayrecord")) or (path / MANIFEST).exists():
            raise UserError(f"{path} holds records but no {JOB}; choose another folder.")
        return False
    found = read_json(path / JOB, "the description of a folder of teacher shards")
    for key, value in wanted.items():
        if found.get(key) != value:
            raise UserError(
                f"{path} was begun with {key} = {found.get(key)!r}, not {value!r}; choose "
                "another folder, or go on with the old setting."
            )
    return True


def checked_sequences(
    sequences: Iterable[dict[str, np.ndarray]], description: ShardsDescription
) -> Iterator[dict[str, np.ndarray]]:
    """The sequences of the job; refuses what would be cut or clamped without a word."""
    num_sequences, seq_len = description.num_records, description.seq_len
    seen = 0
    for sequence in itertools.islice(sequences, num_sequences):
        if len(sequence["tokens"]) != seq_len:
            raise UserError(
                f"sequence {seen} holds {len(sequence['tokens'])} tokens, not seq_len = {seq_len}; "
                "pack the data with the same length."
            )
        largest = max(sequence["tokens"].max(), sequence["labels"].max())
        if largest >= description.vocab_size:
            raise UserError(
                f"sequence {seen} holds id {largest} and the vocabulary ends at "
                f"{description.vocab_size - 1}; use the tokenizer of the teacher."
            )
        seen += 1
        yield sequence
    if seen < num_sequences:
        raise UserError(
            f"the data hold {seen} sequences, not {num_sequences}; ask for that many at most."
        )
