"""A tiny teacher and tiny packed sequences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_jax.distill.teacher import Teacher, TeacherJob, write_teacher_shards

VOCAB, SEQ_LEN, DIM = 300, 24, 8


def hidden_fn(params, tokens, positions, segment_ids):
    """Each position looks at its token and the one before it in its segment."""
    h = params["embedding"][tokens]
    before = jnp.pad(h, ((0, 0), (1, 0), (0, 0)))[:, :-1]
    return h + jnp.where((positions > 0)[:, :, None], before, 0.0)


def embedding_fn(params):
    return params["embedding"]


@pytest.fixture(scope="session")
def params():
    return {"embedding": jax.random.normal(jax.random.key(0), (VOCAB, DIM))}


def make_packed(count, seed=0):
    """Documents of random lengths, packed; the last sequence is padded."""
    rng = np.random.default_rng(seed)
    sequences = []
    for index in range(count):
        sequence = {
            key: np.zeros(SEQ_LEN, np.int32)
            for key in ("tokens", "labels", "segment_ids", "positions")
        }
        end = SEQ_LEN if index < count - 1 else SEQ_LEN - 5
        start, segment = 0, 1
        while start < end:
            length = min(int(rng.integers(1, 15)), end - start)
            document = rng.integers(4, VOCAB, length + 1)
            place = slice(start, start + length)
            sequence["tokens"][place] = document[:-1]
            sequence["labels"][place] = document[1:]
            sequence["segment_ids"][place] = segment
            sequence["positions"][place] = np.arange(length)
            start, segment = start + length, segment + 1
        sequence["loss_mask"] = (np.arange(SEQ_LEN) < end).astype(np.float32)
        sequences.append(sequence)
    return sequences


@pytest.fixture(scope="session")
def make_teacher(params):
    """make_teacher(path, **settings) -> Teacher; compiled once for equal settings."""
    compiled = {}

    def make(path, layout=None, **settings):
        settings = {"draws": 20, "batch_size": 4, "records_per_shard": 6, **settings}
        job = TeacherJob(path=str(path), **settings)
        teacher = Teacher(
            job,
            params=params,
            hidden_fn=hidden_fn,
            embedding_fn=embedding_fn,
            layout=layout,
        )
        key = (job.draws, job.method, job.seed, job.batch_size, layout)
        teacher._step = compiled.setdefault(key, teacher._step)
        return teacher

    return make


@pytest.fixture(scope="session")
def make_sequences():
    """make_sequences(count, seed=0) -> list of packed sequences."""
    return make_packed


@pytest.fixture(scope="session")
def write():
    """write(teacher, sequences, **changes) -> manifest."""

    def call(teacher, sequences, **changes):
        if "num_sequences" not in changes:
            changes["num_sequences"] = len(sequences)
        settings = {
            "seq_len": SEQ_LEN,
            "vocab_size": VOCAB,
            "teacher_hash": "teacher",
            "tokenizer_hash": "tokenizer",
            **changes,
        }
        return write_teacher_shards(teacher, sequences, **settings)

    return call


@pytest.fixture(scope="session")
def shard_folder(tmp_path_factory, make_teacher, make_sequences, write):
    """A finished folder of 16 records in three shards. Tests copy it before they change it."""
    path = tmp_path_factory.mktemp("shards")
    write(make_teacher(path), make_sequences(16))
    return path
