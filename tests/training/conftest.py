"""A tiny model, fixed batches of packed sequences, and a job that trains the one on the other."""

import dataclasses

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_jax.model.config import tiny
from gemma_jax.model.transformer import Transformer
from gemma_jax.sharding import MeshConfig, make_layout
from gemma_jax.training.loop import Job, LoopConfig
from gemma_jax.training.objective import Xent
from gemma_jax.training.optim import AdamW

ROWS, SEQ_LEN = 8, 16


def numbered_batch(number, rows=ROWS, vocab=128):
    """Batch `number` of a run: two documents a row, padding behind the second in odd rows."""
    rng = np.random.default_rng((7, int(number)))
    ids = np.zeros((rows, SEQ_LEN + 1), np.int32)
    ids[:, 0] = rng.integers(0, vocab, rows)
    for place in range(SEQ_LEN):  # mostly a rule, so that there is something to learn
        noise = rng.random(rows) < 0.2
        ids[:, place + 1] = np.where(
            noise, rng.integers(0, vocab, rows), (5 * ids[:, place] + 3) % vocab
        )
    cut = rng.integers(3, SEQ_LEN - 3, rows)[:, None]
    place = np.arange(SEQ_LEN)[None]
    end = np.where(np.arange(rows) % 2, SEQ_LEN - 2, SEQ_LEN)[:, None]
    real = place < end
    return {
        "tokens": np.where(real, ids[:, :-1], 0).astype(np.int32),
        "labels": np.where(real, ids[:, 1:], 0).astype(np.int32),
        "segment_ids": np.where(real, 1 + (place >= cut), 0).astype(np.int32),
        "positions": np.where(real, place - np.where(place >= cut, cut, 0), 0).astype(np.int32),
        "loss_mask": real.astype(np.float32),
    }


class Batches:
    def __init__(self, count):
        self._count = count

    def __len__(self):
        return self._count

    def __getitem__(self, number):
        return numbered_batch(number)


@pytest.fixture(scope="session")
def model():
    return Transformer(dataclasses.replace(tiny(), num_layers=2, attn_pattern="LG"))


@pytest.fixture(scope="session")
def params(model):
    return jax.jit(model.init)(jax.random.key(0))


@pytest.fixture(scope="session")
def make_batch():
    return lambda number, **settings: jax.tree.map(jnp.asarray, numbered_batch(number, **settings))


@pytest.fixture(scope="session")
def one_device():
    return make_layout(MeshConfig(), jax.devices()[:1])


@pytest.fixture
def make_job(model, one_device, tmp_path):
    """make_job(folder, evaluate=..., steps=..., **settings of LoopConfig) -> Job."""

    def make(folder="run", evaluate=None, steps=12, optimizer=None, **changes):
        settings = {"log_every": 2, "eval_every": 4, "checkpoint_every": 4, **changes}
        told = settings.pop("settings", None)
        return Job(
            name="tiny",
            folder=tmp_path / folder,
            config=LoopConfig(**settings),
            layout=one_device,
            init_params=lambda: model.init(jax.random.key(0)),
            axes=model.axes(),
            objective=Xent(z_loss=1e-4).build(model),
            optimizer=optimizer or AdamW(learning_rate=1e-2),
            batches=grain.MapDataset.source(Batches(steps)).to_iter_dataset(
                grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
            ),
            batch_size=ROWS,
            num_steps=steps,
            tokens_per_step=ROWS * SEQ_LEN,
            flops_per_token=1,
            evaluate=evaluate or (lambda params: {"bits_per_byte": 1.0, "loss": 1.0}),
            settings=told,
        )

    return make
