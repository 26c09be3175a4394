"""The teacher's job: run a model over packed sequences and write sparse targets for each token.

One jitted step a batch: hidden states, then chunk after chunk of positions through the vocabulary
head and the sampler. A chunk of logits is all that is ever held of [tokens, V]. While the device
works on a batch the host encodes the one before.
"""

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gemma_jax.distill.records import ID_BITS, MAX_DRAWS, MAX_VOCAB, encode_record
from gemma_jax.distill.sampling import METHODS, Method, sample_targets, token_keys
from gemma_jax.distill.shard_writer import ShardsWriter, checked_sequences
from gemma_jax.distill.shards import ShardsDescription, TeacherShards, is_complete
from gemma_jax.errors import UserError
from gemma_jax.files import locked
from gemma_jax.progress import Advance, progress
from gemma_jax.settings import check_types

Example = dict[str, np.ndarray]
HiddenFn = Callable[[Any, jax.Array, jax.Array, jax.Array], jax.Array]

_INPUTS = ("tokens", "labels", "positions", "segment_ids")
_MAX_LOGITS = 2**26  # entries of one chunk of logits on a device: 256 MiB in float32


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherJob:
    """Where the shards go and how targets are drawn. Sizes count sequences."""

    path: str
    draws: int = 64
    method: Method = "systematic"
    seed: int = 0
    batch_size: int = 8
    records_per_shard: int = 256

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


class TeacherOutput(NamedTuple):
    """What the teacher says of a batch [B, T].

    `words` uint32 [B, T, N]: id | count << 18, ids ascending, count 0 = unused; `label_logprob`,
    `entropy` float32 [B, T] in nats.
    """

    words: Any
    label_logprob: Any
    entropy: Any


class Teacher:
    """A teacher model bound to its parameters and a way to draw: batches of sequences to targets.

    `hidden_fn(params, tokens, positions, segment_ids)` gives final hidden states [B, T, D],
    `embedding_fn(params)` the output embedding [V, D]; logits are their product in the dtype of the
    hidden states, accumulated in float32, through `softcap * tanh(logits / softcap)` where given.
    `batch_sharding` places the [B, T] inputs over devices.
    """

    def __init__(
        self,
        job: TeacherJob,
        *,
        params: Any,
        hidden_fn: HiddenFn,
        embedding_fn: Callable[[Any], jax.Array],
        softcap: float | None = None,
        batch_sharding: jax.sharding.Sharding | None = None,
    ) -> None:
        self.job = job
        self.vocab_size = int(jax.eval_shape(embedding_fn, params).shape[0])
        if self.vocab_size > MAX_VOCAB:
            raise UserError(
                f"the teacher has {self.vocab_size} ids and shards hold up to {MAX_VOCAB}; use a "
                "smaller vocabulary."
            )
        self._params = params
        self._sharding = batch_sharding
        chunk = max(1, _MAX_LOGITS // (_rows_a_device(job, batch_sharding) * self.vocab_size))

        def step(
            params: Any, batch: dict[str, jax.Array], record_index: jax.Array
        ) -> TeacherOutput:
            hidden = hidden_fn(params, batch["tokens"], batch["positions"], batch["segment_ids"])
            embedding = embedding_fn(params).astype(hidden.dtype)
            return _sample_chunks(
                hidden, embedding, batch["labels"], record_index, job, softcap, chunk
            )

        self._step = jax.jit(step)

    def dispatch(
        self, sequences: Sequence[Example], record_indices: Sequence[int]
    ) -> TeacherOutput:
        """Starts work on up to `job.batch_size` sequences; the result has that many rows."""
        spare = self.job.batch_size - len(sequences)
        batch = {}
        for key in _INPUTS:
            rows = np.stack([sequence[key] for sequence in sequences]).astype(np.int32)
            batch[key] = jax.device_put(np.pad(rows, ((0, spare), (0, 0))), self._sharding)
        indices = np.pad(np.asarray(record_indices, np.int32), (0, spare))
        return self._step(self._params, batch, jnp.asarray(indices))

    def __call__(
        self, sequences: Sequence[Example], record_indices: Sequence[int]
    ) -> TeacherOutput:
        """The output for any number of sequences, on the host."""
        parts = []
        for start in range(0, len(sequences), self.job.batch_size):
            rows = slice(start, start + self.job.batch_size)
            parts.append(jax.device_get(self.dispatch(sequences[rows], record_indices[rows])))
        return TeacherOutput(
            *(np.concatenate(arrays)[: len(sequences)] for arrays in zip(*parts, strict=True))
        )


def _rows_a_device(job: TeacherJob, sharding: jax.sharding.Sharding | None) -> int:
    if sharding is None:
        return job.batch_size
    try:
        return sharding.shard_shape((job.batch_size, 1))[0]
    except ValueError:
        raise UserError(
            f"batch_size = {job.batch_size} does not divide over the {sharding.num_devices} "
            "devices of the mesh; choose a multiple."
        ) from None


def _sample_chunks(
    hidden: jax.Array,
    embedding: jax.Array,
    labels: jax.Array,
    record_index: jax.Array,
    job: TeacherJob,
    softcap: float | None,
    chunk: int,
) -> TeacherOutput:
    """Targets [B, T, ...], `chunk` positions of every row at a time."""
    B, T, _ = hidden.shape
    chunk = min(chunk, T)
    keys = token_keys(jax.random.key(job.seed), record_index, T + -T % chunk)

    def split(array: jax.Array) -> jax.Array:  # [B, T, ...] -> [chunks, B, chunk, ...]
        padded = jnp.pad(array, ((0, 0), (0, -T % chunk)) + ((0, 0),) * (array.ndim - 2))
        return jnp.moveaxis(padded.reshape(B, -1, chunk, *array.shape[2:]), 1, 0)

    def one(inputs: tuple[jax.Array, jax.Array, jax.Array]) -> TeacherOutput:
        hidden, labels, keys = inputs
        logits = jnp.einsum("btd,vd->btv", hidden, embedding, preferred_element_type=jnp.float32)
        if softcap is not None:
            logits = softcap * jnp.tanh(logits / softcap)
        sampled = sample_targets(
            logits.reshape(B * chunk, -1),
            labels.reshape(-1),
            keys.reshape(-1),
            draws=job.draws,
            method=job.method,
        )
        ids, counts = sampled.ids.astype(jnp.uint32), sampled.counts.astype(jnp.uint32)
        words = jnp.where(counts > 0, ids | counts << ID_BITS, 0)
        flat = (words, sampled.label_logprob, sampled.entropy)
        return TeacherOutput(*(x.reshape(B, chunk, *x.shape[1:]) for x in flat))

    key_chunks = jnp.moveaxis(keys.reshape(B, -1, chunk), 1, 0)
    outputs = jax.lax.map(one, (split(hidden), split(labels), key_chunks))
    return TeacherOutput(
        *(jnp.moveaxis(x, 0, 1).reshape(B, -1, *x.shape[3:])[:, :T] for x in outputs)
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
    with locked(Path(job.path)):
        return _write(teacher, sequences, description)


def _write(
    teacher: Teacher, sequences: Iterable[Example], description: ShardsDescription
) -> dict[str, Any]:
    writer = ShardsWriter(teacher.job.path, description)
    shards = range(len(description.shard_names()))
    if is_complete(writer.path) and all(map(writer.is_written, shards)):
        return TeacherShards.open(writer.path).manifest
    source = checked_sequences(sequences, description)
    sizes = [len(description.shard_range(shard)) for shard in shards]
    seq_len, total = description.seq_len, description.num_records * description.seq_len
    ready = sum(size for shard, size in enumerate(sizes) if writer.is_written(shard))
    with progress("teacher", total, start=ready * seq_len) as advance:
        for shard in shards:
            indices = description.shard_range(shard)
            ours = itertools.islice(source, len(indices))
            if writer.is_written(shard):
                writer.adopt(shard, ours)
            else:
                writer.write(shard, _records(teacher, ours, indices, advance))
    return writer.finish()


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
            yield from _encode(teacher.job, *waiting)
            done = sum(len(sequence["tokens"]) for sequence in waiting[0])
            tokens += done
            advance(done, f"{tokens / (time.monotonic() - began):,.0f} tokens/s")
        waiting = started


def _encode(
    job: TeacherJob, sequences: list[Example], indices: range, output: TeacherOutput
) -> Iterator[bytes]:
    words, label_logprob, entropy = jax.device_get(output)
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
