"""A teacher's job in a process of its own, slow enough to be killed at any place."""

import sys
import time
from pathlib import Path

import jax

sys.path.insert(0, str(Path(__file__).parent))

import conftest

from gemma_jax.distill.teacher import Teacher, TeacherJob, write_teacher_shards

COUNT = 16


def _slowly(sequences):
    print("begins", flush=True)
    for sequence in sequences:
        time.sleep(0.02)
        yield sequence


if __name__ == "__main__":
    job = TeacherJob(path=sys.argv[1], draws=20, batch_size=4, records_per_shard=6)
    teacher = Teacher(
        job,
        params={"embedding": jax.random.normal(jax.random.key(0), (conftest.VOCAB, conftest.DIM))},
        hidden_fn=conftest.hidden_fn,
        embedding_fn=conftest.embedding_fn,
    )
    write_teacher_shards(
        teacher,
        _slowly(conftest.make_packed(COUNT)),
        num_sequences=COUNT,
        seq_len=conftest.SEQ_LEN,
        vocab_size=conftest.VOCAB,
        teacher_hash="teacher",
        tokenizer_hash="tokenizer",
    )
