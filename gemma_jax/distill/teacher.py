"""The teacher's job: run a model over packed sequences and write sparse targets for each token.

One jitted step a batch: hidden states, then targets (`head.py`). While the devices work on a batch
the host encodes the one before, and a thread writes the shard before this one. Of several processes
all compute and the first writes.
"""

import collections
import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gemma_jax.distill.head import HeadSettings, TeacherOutput, draw
from gemma_jax.distill.records import MAX_DRAWS, MAX_VOCAB, encode_record
from gemma_jax.distill.sampling import METHODS, Method
from gemma_jax.distill.shard_writer import ShardsWriter, checked_sequences
from gemma_jax.distill.shards import ShardsDescription, TeacherShards, is_complete
from gemma_jax.errors import UserError
from gemma_jax.files import locked
from gemma_jax.hosts import fetch, first_alone, is_first, of_first
from gemma_jax.progress import Advance, progress
from gemma_jax.settings import check_types
from gemma_jax.sharding import Layout, MeshConfig, active

Example = dict[str, np.ndarray]
HiddenFn = Callable[[Any, jax.Array, jax.Array, jax.Array], jax.Array]

_INPUTS = ("tokens", "labels", "positions", "segment_ids")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherJob:
    """Where the shards go and how targets are drawn. Sizes count sequences.

    `mesh` splits the teacher over devices; what is drawn does not depend on it.
    """

    path: str
    draws: int = 64
    method: Method = "systematic"
    seed: int = 0
    batch_size: int = 8
    records_per_shard: int = 256
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self) -> None:
        check_types(self)
        if not 1 <= self.draws <= MAX_DRAWS:
            raise UserError(f"draws = {self.draws} is outside 1..{MAX_DRAWS}; 50 to 100 is usual.")
        if self.method not in METHODS:
            raise UserError(f"method = {self.method!r} is unknown; choose {' or '.join(METHODS)}.")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed = {self.seed} is outside 0..2**32-1; choose another.")
        for name in ("batch_size", "records_per_shard"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} = {getattr(self, name)} is below 1; choose a larger one.")


class Teacher:
    """A teacher model bound to its parameters and a way to draw: batches of sequences to targets.

    `hidden_fn(params, tokens, positions, segment_ids)` gives final hidden states [B, T, D],
    `embedding_fn(params)` the output embedding [V, D]; logits are their product in the dtype of the
    hidden states, accumulated in float32, through `softcap * tanh(logits / softcap)` where given.
    With `layout` the work is split over devices, with `params` laid out by it.
    """

    def __init__(
        self,
        job: TeacherJob,
        *,
        params: Any,
        hidden_fn: HiddenFn,
        embedding_fn: Callable[[Any], jax.Array],
        softcap: float | None = None,
        layout: Layout | None = None,
    ) -> None:
        self.job = job
        self.vocab_size = int(jax.eval_shape(embedding_fn, params).shape[0])
        if self.vocab_size > MAX_VOCAB:
            raise UserError(
                f"the teacher has {self.vocab_size} ids and shards hold up to {MAX_VOCAB}; use a "
                "smaller vocabulary."
            )
        split = layout.batch_size_multiple if layout is not None else 1
        if job.batch_size % split:
            raise UserError(
                f"batch_size = {job.batch_size} of the teacher does not divide over the {split} "
                "devices of the mesh's batch axes; choose a multiple."
            )
        self._params = params
        self._layout = layout
        settings = HeadSettings(job.seed, job.draws, job.method, softcap)

        def step(
            params: Any, batch: dict[str, jax.Array], record_index: jax.Array
        ) -> TeacherOutput:
            hidden = hidden_fn(params, batch["tokens"], batch["positions"], batch["segment_ids"])
            return draw(hidden, embedding_fn(params), batch["labels"], record_index, settings)

        self._step = jax.jit(step)

    def dispatch(
        self, sequences: Sequence[Example], record_indices: Sequence[int]
    ) -> TeacherOutput:
        """Starts work on up to `job.batch_size` sequences; the result has that many rows."""
        spare = self.job.batch_size - len(sequences)
        batch = {}
        for key in _INPUTS:
            rows = np.stack([sequence[key] for sequence in sequences]).astype(np.int32)
            batch[key] = np.pad(rows, ((0, spare), (0, 0)))
        indices = np.pad(np.asarray(record_indices, np.int32), (0, spare))
        if self._layout is None:
            return self._step(self._params, batch, indices)
        placed = self._layout.place({**batch, "record_index": indices})
        index = placed.pop("record_index")
        with self._layout.active():
            return self._step(self._params, placed, index)

    def trace(self, seq_len: int) -> tuple[Any, dict[str, Any]]:
        """The work on one batch of sequences as a program that is not compiled yet, and the batch
        as shapes. `params` may be shapes too."""

        def like(*shape: int) -> jax.ShapeDtypeStruct:
            where = None if self._layout is None else self._layout.batch_sharding()
            return jax.ShapeDtypeStruct(shape, np.int32, sharding=where)

        batch = {key: like(self.job.batch_size, seq_len) for key in _INPUTS}
        with active(self._layout):
            return self._step.trace(self._params, batch, like(self.job.batch_size)), batch

    def __call__(
        self, sequences: Sequence[Example], record_indices: Sequence[int]
    ) -> TeacherOutput:
        """The output for any number of sequences, on the host."""
        parts = []
        for start in range(0, len(sequences), self.job.batch_size):
            rows = slice(start, start + self.job.batch_size)
            parts.append(fetch(self.dispatch(sequences[rows], record_indices[rows])))
        return TeacherOutput(
            *(np.concatenate(arrays)[: len(sequences)] for arrays in zip(*parts, strict=True))
        )


def write_teacher_shards(
    teacher: Teacher,
    sequences: Iterable[Example],
    *,
    num_sequences: int,
    seq_len: int,
    vocab_size: int,
    teacher_hash: str,
    tokenizer_hash: str,
) -> dict[str, Any]:
    """Writes the shards of `teacher.job` and returns their manifest.

    `sequences` gives the packed sequences in a fixed order, [T] arrays each; the first
    `num_sequences` are used. Finished work returns at once. After a kill the same call goes on at
    the first missing shard, and ends with the bytes of an uninterrupted run; a second process waits
    for the first. Raises UserError where the folder was begun for anything else.
    """
    job = teacher.job
    if teacher.vocab_size != vocab_size:
        raise UserError(
            f"the teacher has {teacher.vocab_size} ids and the tokenizer {vocab_size}; use the "
            "tokenizer that the teacher was trained with."
        )
    if num_sequences < 1:
        raise UserError("there is no sequence to run the teacher over; give it a larger corpus.")
    description = ShardsDescription(
        teacher_hash=teacher_hash,
        tokenizer_hash=tokenizer_hash,
        vocab_size=vocab_size,
        seq_len=seq_len,
        draws=job.draws,
        method=job.method,
        seed=job.seed,
        num_records=num_sequences,
        records_per_shard=job.records_per_shard,
    )
    with locked(Path(job.path)) if is_first() else contextlib.nullcontext():
        return _write(teacher, sequences, description)


def _write(
    teacher: Teacher, sequences: Iterable[Example], description: ShardsDescription
) -> dict[str, Any]:
    # All processes go through the same batches; the others' writers write nothing.
    writer = first_alone(lambda: ShardsWriter(teacher.job.path, description))
    shards = range(len(description.shard_names()))
    done = of_first(np.array([is_complete(writer.path), *map(writer.is_written, shards)]))
    if done.all():
        return TeacherShards.open(writer.path).manifest
    source = checked_sequences(sequences, description)
    sizes = [len(description.shard_range(shard)) for shard in shards]
    seq_len, total = description.seq_len, description.num_records * description.seq_len
    ready = sum(size for size, there in zip(sizes, done[1:], strict=True) if there)
    # A shard is compressed and written in a thread, while the devices work on the next one.
    with (
        progress("teacher", total, start=ready * seq_len) as advance,
        ThreadPoolExecutor(1) as thread,
    ):
        written: Future[None] = thread.submit(lambda: None)
        for shard in shards:
            indices = description.shard_range(shard)
            ours = itertools.islice(source, len(indices))
            records = None if done[1 + shard] else _records(teacher, ours, indices, advance)
            if not is_first():
                collections.deque(ours if records is None else records, maxlen=0)
                continue
            contents = None if records is None else list(records)
            written.result()  # at most one waits, and they are noted in order
            if contents is None:
                writer.adopt(shard, ours)
            else:
                written = thread.submit(writer.write, shard, contents)
        written.result()

    def finish() -> dict[str, Any]:
        return writer.finish() if is_first() else TeacherShards.open(writer.path).manifest

    return first_alone(finish)


def _records(
    teacher: Teacher, sequences: Iterator[Example], indices: range, advance: Advance
) -> Iterator[bytes]:
    """The encoded records of one shard, one batch behind the device.

    Batches end with the shard, so that a job resumed at a shard computes what an uninterrupted one
    computes, down to the rounding of its matmuls.
    """
    size = teacher.job.batch_size
    waiting: tuple[list[Example], range, TeacherOutput] | None = None
    began, tokens = time.monotonic(), 0
    for start in [*range(0, len(indices), size), None]:
        started = None
        if start is not None:
            batch_indices = indices[start : start + size]
            batch = list(itertools.islice(sequences, len(batch_indices)))
            started = (batch, batch_indices, teacher.dispatch(batch, batch_indices))
        if waiting is not None:
            output = fetch(waiting[2])
            if is_first():
                yield from _encode(teacher.job, waiting[0], waiting[1], output)
            done = sum(len(sequence["tokens"]) for sequence in waiting[0])
            tokens += done
            advance(done, f"{tokens / (time.monotonic() - began):,.0f} tokens/s")
        waiting = started


def _encode(
    job: TeacherJob, sequences: list[Example], indices: range, output: TeacherOutput
) -> Iterator[bytes]:
    words, label_logprob, entropy = output
    for row, (sequence, index) in enumerate(zip(sequences, indices, strict=True)):
        kept = sequence["loss_mask"] > 0
        # The label's log-probability may be -inf (an id that the teacher excludes); never NaN.
        if not np.isfinite(entropy[row][kept]).all() or np.isnan(label_logprob[row][kept]).any():
            raise UserError(
                f"the teacher's probabilities for sequence {index} are not finite; check its "
                "checkpoint."
            )
        yield encode_record(
            sequence,
            words[row],
            label_logprob[row],
            entropy[row],
            record_index=index,
            draws=job.draws,
        )
