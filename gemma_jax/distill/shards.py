"""Teacher shards: a folder of ArrayRecord files that a student trains from.

    job.json                            what the folder is for, written before anything else
    teacher-00000-of-00012.arrayrecord  records of `records.py`, one a packed sequence, group size 1
    manifest.json                       written last: a folder without one is not finished

docs/formats.md holds the bytes.
"""

import dataclasses
import hashlib
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from gemma_jax.buckets import local, place, size
from gemma_jax.data.loader import checked_rows
from gemma_jax.distill.records import Record, RecordError, decode_record
from gemma_jax.errors import UserError
from gemma_jax.files import patiently, read_json

FORMAT = "gemma_jax teacher shards"
VERSION = 1
MANIFEST = "manifest.json"
JOB = "job.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardsDescription:
    """What a folder of shards holds: pinned by its first run and repeated in the manifest."""

    teacher_hash: str
    tokenizer_hash: str
    vocab_size: int
    seq_len: int
    draws: int
    method: str
    seed: int
    num_records: int
    records_per_shard: int

    def shard_names(self) -> list[str]:
        n = -(-self.num_records // self.records_per_shard)
        return [f"teacher-{i:05d}-of-{n:05d}.arrayrecord" for i in range(n)]

    def shard_range(self, shard: int) -> range:
        """The record indices of one shard."""
        start = shard * self.records_per_shard
        return range(start, min(start + self.records_per_shard, self.num_records))


class Totals:
    """Sums over records, added in order, that the manifest repeats."""

    def __init__(self) -> None:
        self.num_tokens = self.unique_ids = self.max_targets = self.most_documents = 0
        self._cross_entropy = self._entropy = 0.0
        self._token_hash = hashlib.sha256()

    def add(self, record: Record) -> None:
        self._token_hash.update(record.tokens.astype("<i4").tobytes())
        self.num_tokens += len(record.label_logprob)
        self.unique_ids += len(record.ids)
        self.max_targets = max(self.max_targets, int(record.num_targets.max(initial=0)))
        runs = 1 + int(np.count_nonzero(np.diff(record.segment_ids)))
        self.most_documents = max(self.most_documents, runs)
        self._cross_entropy -= float(record.label_logprob.sum(dtype=np.float64))
        self._entropy += float(record.entropy.sum(dtype=np.float64))

    def fields(self) -> dict[str, Any]:
        """The manifest's fields; the two means are in nats a kept token."""
        tokens = max(self.num_tokens, 1)
        return {
            "num_tokens": self.num_tokens,
            "unique_ids": self.unique_ids,
            "max_targets": self.max_targets,
            "most_documents": self.most_documents,
            "teacher_cross_entropy": self._cross_entropy / tokens,
            "teacher_entropy": self._entropy / tokens,
            "token_hash": self._token_hash.hexdigest(),
        }


class DamagedShardError(UserError):
    """`what` is wrong with one file."""

    def __init__(self, file: Path, what: str) -> None:
        super().__init__(f"{what}; delete that file and run the teacher again to write it anew.")
        self.file, self.what = file, what


class ShardFile:
    """Random access to one file, opened at the first read."""

    def __init__(self, file: Path, num_records: int) -> None:
        self.file = file
        self.num_records = num_records
        self._reader: Any = None
        self._lock = threading.Lock()

    def record(self, place: int) -> Record:
        def read() -> bytes:
            return self._open().read([place])[0]

        def reopen() -> None:
            self._reader = None

        try:
            content = patiently(read, self.file, doing="read", before_again=reopen)
            return decode_record(content)
        except UserError:
            raise
        except (RuntimeError, IndexError, RecordError) as error:
            raise self.damaged(place, error) from None

    def damaged(self, place: int, cause: object) -> DamagedShardError:
        return DamagedShardError(self.file, f"record {place} of {self.file} is damaged ({cause})")

    def _open(self) -> Any:
        with self._lock:
            if self._reader is None:
                reader = ArrayRecordReader(str(local(self.file)), "readahead_buffer_size:0")
                if reader.num_records() != self.num_records:
                    raise RuntimeError(
                        f"the file holds {reader.num_records()} of {self.num_records} records"
                    )
                self._reader = reader
            return self._reader

    def __getstate__(self) -> dict[str, Any]:
        return {"file": self.file, "num_records": self.num_records}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


def refuse_damaged(damaged: Sequence[DamagedShardError]) -> None:
    """Names all of them at once, and what is wrong with the first."""
    if len(damaged) == 1:
        raise damaged[0]
    if damaged:
        names = ", ".join(str(one.file) for one in damaged)
        raise UserError(
            f"{len(damaged)} shards are damaged ({damaged[0].what}); delete {names} and run the "
            "teacher again to write them anew."
        )


class TeacherShards:
    """Random access to finished shards. `len`, `[i]` and `__getitems__` make it a Grain source."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest
        self._shards = [ShardFile(path / s["name"], s["records"]) for s in manifest["shards"]]
        self._ends = np.cumsum([shard.num_records for shard in self._shards])

    @classmethod
    def open(cls, path: str | Path) -> "TeacherShards":
        """Opens the folder `path`; refuses an unfinished one, a missing or a truncated shard."""
        path = place(path)
        if not (path / MANIFEST).exists() and (path / JOB).exists():
            raise UserError(f"{path} is not finished; run the teacher again to write the rest.")
        manifest = _read_manifest(path)
        damaged = []
        for shard in manifest["shards"]:
            file = path / shard["name"]
            found = size(file) if file.exists() else 0
            if found != shard["bytes"]:
                what = f"{file} holds {found} bytes where the manifest says {shard['bytes']}"
                damaged.append(DamagedShardError(file, what))
        refuse_damaged(damaged)
        return cls(path, manifest)

    def check_tokenizer(self, tokenizer_hash: str) -> None:
        """Refuses a tokenizer other than the one whose ids the shards hold."""
        if tokenizer_hash != self.manifest["tokenizer_hash"]:
            raise UserError(
                f"{self.path} was written with tokenizer {self.manifest['tokenizer_hash'][:12]}, "
                f"not {tokenizer_hash[:12]}; write the shards again or use their tokenizer."
            )

    @property
    def seq_len(self) -> int:
        return int(self.manifest["seq_len"])

    @property
    def max_targets(self) -> int:
        """M, the largest number of distinct ids at any position."""
        return max(self.manifest["max_targets"], 1)

    @property
    def most_documents(self) -> int | None:
        """Segments of a sequence at most, padding counted; None where it was not noted."""
        return self.manifest.get("most_documents")

    def __len__(self) -> int:
        return self.manifest["num_records"]

    def locate(self, index: int) -> tuple[ShardFile, int]:
        """The shard of record `index`, and the record's place in it."""
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return self._shards[shard], index - int(self._ends[shard] - self._shards[shard].num_records)

    def raw_record(self, index: int) -> Record:
        """Record `index` as stored."""
        shard, place = self.locate(index)
        return shard.record(place)

    def record(self, index: int) -> dict[str, np.ndarray]:
        """Record `index` as [T] arrays, with target_ids and target_weights [T, M]."""
        return self.raw_record(index).padded(self.max_targets)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self.record(index)

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, np.ndarray]]:
        return [self.record(int(index)) for index in indices]

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return (self.record(index) for index in range(len(self)))


def is_complete(path: Path) -> bool:
    """Whether the manifest is there, and every shard that it names."""
    if not (path / MANIFEST).exists():
        return False
    return all((path / shard["name"]).exists() for shard in _read_manifest(path)["shards"])


def _read_manifest(path: Path) -> dict[str, Any]:
    manifest = read_json(path / MANIFEST, "the manifest of teacher shards")
    if manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
        raise UserError(
            f"{path / MANIFEST} is {manifest.get('format')!r} version "
            f"{manifest.get('version')!r}, not {FORMAT!r} version {VERSION}; give a folder "
            "written by the teacher."
        )
    fields = {field.name for field in dataclasses.fields(ShardsDescription)}
    fields |= {"num_tokens", "unique_ids", "max_targets", "bytes", "shards"}
    missing = sorted(fields - manifest.keys())
    if not missing:
        wanted = {"name", "records", "bytes", "sha256"}
        missing = sorted(set().union(*(wanted - shard.keys() for shard in manifest["shards"])))
    if missing:
        raise UserError(
            f"{path / MANIFEST} does not say {missing[0]}; delete it and run the teacher again to "
            "write it anew."
        )
    return manifest


def shard_order(shards: TeacherShards, *, batch_size: int, seed: int) -> grain.MapDataset:
    """The numbers of the records of each batch."""
    return grain.MapDataset.range(len(shards)).seed(seed).shuffle().repeat().batch(batch_size)


def shard_stream(
    shards: TeacherShards,
    *,
    batch_size: int,
    seed: int,
    rows: Sequence[int] | None = None,
) -> grain.IterDataset:
    """Endless batches, shuffled anew each epoch; `batch_size` counts the rows of all hosts.

    Batch k of the run holds the same rows whatever the number of hosts; a host reads `rows` of it
    (all by default) and nothing else. The iterator's state is a few bytes and exact.
    """
    mine = checked_rows(batch_size, rows)

    def load(indices: np.ndarray) -> dict[str, np.ndarray]:
        examples = shards.__getitems__(indices[mine].tolist())
        return {key: np.stack([example[key] for example in examples]) for key in examples[0]}

    return (
        shard_order(shards, batch_size=batch_size, seed=seed)
        .map(load)
        .to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4))
    )
