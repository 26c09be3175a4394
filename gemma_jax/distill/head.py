"""A teacher's head: from hidden states to drawn targets, chunk after chunk of positions.

A chunk of logits is all that is ever held of [tokens, V], and of that each device holds its own
tokens and its own part of the vocabulary.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gemma_jax.distill.mass_tree import VocabSplit
from gemma_jax.distill.records import ID_BITS
from gemma_jax.distill.sampling import Method, sample_targets, token_keys
from gemma_jax.ops.hardware import on_gpu
from gemma_jax.ops.table import table_parts
from gemma_jax.sharding import current_layout

_MAX_LOGITS = 2**26  # entries of one chunk of logits on a device: 256 MiB in float32
_MAX_LOGITS_GPU = 2**28  # there each chunk reads the table anew from a memory that is far


class HeadSettings(NamedTuple):
    seed: int
    draws: int
    method: Method
    softcap: float | None


class TeacherOutput(NamedTuple):
    """What the teacher says of a batch [B, T].

    `words` uint32 [B, T, N]: id | count << 18, ids ascending, count 0 = unused; `label_logprob`,
    `entropy` float32 [B, T] in nats.
    """

    words: Any
    label_logprob: Any
    entropy: Any


def draw(
    hidden: jax.Array,
    embedding: jax.Array,
    labels: jax.Array,
    record_index: jax.Array,
    settings: HeadSettings,
) -> TeacherOutput:
    """Targets of [B, T] positions, on each device of its own tokens and part of the vocabulary."""
    layout = current_layout()
    if layout is None:
        embedding = embedding.astype(hidden.dtype)
        return _sample_chunks(hidden, embedding, labels, record_index, settings, None)
    size, axis = embedding.shape[0], layout.rules.vocab
    split = None
    if axis is not None and axis not in layout.rules.batch and layout.mesh.shape[axis] > 1:
        split = VocabSplit(axis, layout.mesh.shape[axis], size)
        embedding = jnp.pad(embedding, ((0, split.padded_size - size), (0, 0)))
    parts = table_parts(embedding.shape, hidden.shape[0])
    assert parts is not None

    def local(
        hidden: jax.Array, embedding: jax.Array, labels: jax.Array, record_index: jax.Array
    ) -> TeacherOutput:
        table = parts.gather(embedding.astype(hidden.dtype))
        return _sample_chunks(hidden, table, labels, record_index, settings, split)

    rows = parts.rows
    return jax.shard_map(
        local,
        mesh=layout.mesh,
        in_specs=(rows, parts.table, rows, rows),
        out_specs=TeacherOutput(rows, rows, rows),
        check_vma=False,
    )(hidden, embedding, labels, record_index)


def _sample_chunks(
    hidden: jax.Array,
    table: jax.Array,
    labels: jax.Array,
    record_index: jax.Array,
    settings: HeadSettings,
    split: VocabSplit | None,
) -> TeacherOutput:
    """Targets [B, T, ...] of this device's rows, a chunk of positions of every row at a time."""
    B, T, _ = hidden.shape
    most = _MAX_LOGITS_GPU if on_gpu() else _MAX_LOGITS
    chunk = min(max(1, most // (B * table.shape[0])), T)
    keys = token_keys(jax.random.key(settings.seed), record_index, T + -T % chunk)

    def split_up(array: jax.Array) -> jax.Array:  # [B, T, ...] -> [chunks, B, chunk, ...]
        padded = jnp.pad(array, ((0, 0), (0, -T % chunk)) + ((0, 0),) * (array.ndim - 2))
        return jnp.moveaxis(padded.reshape(B, -1, chunk, *array.shape[2:]), 1, 0)

    def one(inputs: tuple[jax.Array, jax.Array, jax.Array]) -> TeacherOutput:
        hidden, labels, keys = inputs
        logits = jnp.einsum("btd,vd->btv", hidden, table, preferred_element_type=jnp.float32)
        if settings.softcap is not None:
            logits = settings.softcap * jnp.tanh(logits / settings.softcap)
        if split is not None and split.padded_size > split.vocab_size:
            first = jax.lax.axis_index(split.axis) * table.shape[0]
            exists = first + jnp.arange(table.shape[0], dtype=jnp.int32) < split.vocab_size
            logits = jnp.where(exists, logits, -jnp.inf)
        sampled = sample_targets(
            logits.reshape(B * chunk, -1),
            labels.reshape(-1),
            keys.reshape(-1),
            draws=settings.draws,
            method=settings.method,
            split=split,
        )
        ids, counts = sampled.ids.astype(jnp.uint32), sampled.counts.astype(jnp.uint32)
        words = jnp.where(counts > 0, ids | counts << ID_BITS, 0)
        flat = (words, sampled.label_logprob, sampled.entropy)
        return TeacherOutput(*(x.reshape(B, chunk, *x.shape[1:]) for x in flat))

    key_chunks = jnp.moveaxis(keys.reshape(B, -1, chunk), 1, 0)
    outputs = jax.lax.map(one, (split_up(hidden), split_up(labels), key_chunks))
    return TeacherOutput(
        *(jnp.moveaxis(x, 0, 1).reshape(B, -1, *x.shape[3:])[:, :T] for x in outputs)
    )
