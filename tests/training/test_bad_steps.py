"""Steps that are not finite or far over what is usual: stopped at, skipped, named, kept."""

import dataclasses
import json
import os
import signal

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_jax.errors import Interrupted, UserError
from gemma_jax.training.bad_steps import Skip, Stop
from gemma_jax.training.checkpoint import checkpoint_steps
from gemma_jax.training.lookout import FILE
from gemma_jax.training.loop import train
from gemma_jax.training.metrics import read_metrics
from gemma_jax.training.optim import AdamW, Cosine

SPEEDS = ("tokens_per_s", "mfu", "data_wait")


class Spoiled:
    """Batches, some of which multiply the loss."""

    def __init__(self, batches, factors, left_out=()):
        self._batches, self._factors = batches, factors
        self._numbers = [n for n in range(len(batches)) if n + 1 not in left_out]

    def __len__(self):
        return len(self._numbers)

    def __getitem__(self, place):
        number = self._numbers[place]
        batch = self._batches[number]
        factor = np.float32(self._factors.get(number + 1, 1))
        return batch | {"factor": np.full(len(batch["tokens"]), factor)}


@pytest.fixture
def make(make_job):
    """make(folder, {step: factor}, ...) -> a job of 12 steps, the loss of some multiplied."""

    def make(folder, factors, left_out=(), **settings):
        steps = 12 - len(left_out)
        job = make_job(folder, steps=steps, **{"log_every": 3, **settings})
        source = Spoiled([make_batch(n) for n in range(12)], factors, left_out)

        def objective(params, batch, rng):
            loss, sums = job.objective(params, batch, rng)
            factor = batch["factor"].mean()
            total, weight = sums["loss"]
            return loss * factor, sums | {"loss": (total * factor, weight)}

        batches = grain.MapDataset.source(source).to_iter_dataset()
        return dataclasses.replace(job, objective=objective, batches=batches)

    return make


def make_batch(number):
    rng = np.random.default_rng(number)
    ids = rng.integers(0, 128, (8, 17)).astype(np.int32)
    return {
        "tokens": ids[:, :-1],
        "labels": ids[:, 1:],
        "segment_ids": np.ones((8, 16), np.int32),
        "positions": np.tile(np.arange(16, dtype=np.int32), (8, 1)),
        "loss_mask": np.ones((8, 16), np.float32),
    }


def lines(job):
    return [json.loads(line) for line in (job.folder / FILE).read_text().splitlines()]


def records(job):
    return [{k: x for k, x in line.items() if k not in SPEEDS} for line in read_metrics(job.folder)]


NAN = {7: np.nan}
SPIKE = {7: 30.0}


@pytest.mark.parametrize(
    ("factors", "setting"),
    [
        (NAN, Stop()),
        (SPIKE, Stop(loss_over=3.0, window=4)),
        (SPIKE, Stop(grad_norm_over=5.0, window=4)),
    ],
    ids=["nan", "loss", "norm"],
)
def test_a_run_stops_with_the_state_before_the_step(make, factors, setting):
    """Two steps later, at the next look; the state is that of a run whose data end before it."""
    job = make("run", factors, on_bad_step=setting)
    with pytest.raises(UserError, match=r"at step 7 \(sequences 48, 49, 50, 51, ...\); the state"):
        train(job)
    assert checkpoint_steps(job.folder) == [4, 6]
    (line,) = lines(job)
    assert line["step"] == 7
    assert line["sequences"] == list(range(48, 56))
    assert (line["loss"] == "nan") == (factors is NAN)
    with pytest.raises(UserError, match="at step 7"):  # it was no accident
        train(job)
    mended = train(make("run", {}, on_bad_step=setting))
    whole = train(make("whole", {}, on_bad_step=setting))
    jax.tree.map(np.testing.assert_array_equal, mended.params, whole.params)


@pytest.mark.parametrize(
    ("factors", "setting"),
    [(NAN, Skip()), (SPIKE, Skip(loss_over=3.0, window=4))],
    ids=["nan", "loss"],
)
def test_a_skipped_step_is_as_if_it_had_not_been(make, capsys, factors, setting):
    """The reference is a run over the other batches; the learning rate is the same in all steps."""
    optimizer = AdamW(learning_rate=1e-2, schedule=Cosine(final=1.0))
    job = make("run", factors, on_bad_step=setting, optimizer=optimizer)
    skipped = train(job)
    assert "at step 7 (sequences 48, 49, 50, 51, ...); it was skipped" in capsys.readouterr().err
    other = make("other", {}, left_out=(7,), on_bad_step=setting, optimizer=optimizer)
    reference = train(other)
    jax.tree.map(np.testing.assert_array_equal, skipped.params, reference.params)
    assert skipped.metrics["skipped"] == 1
    assert read_metrics(job.folder)[-1]["step"] == 12


def test_a_resumed_run_skips_the_same_steps(make):
    """Stopped between the steps that the median is made of, and while the window fills."""
    factors = {6: 50.0, 8: np.nan, 11: 50.0}
    settings = {"on_bad_step": Skip(grad_norm_over=5.0, window=4), "eval_every": 5}
    whole = train(make("whole", factors, **settings))

    def stop(params):
        os.kill(os.getpid(), signal.SIGINT)
        return {"bits_per_byte": 1.0, "loss": 1.0}

    for _ in range(2):
        with pytest.raises(Interrupted):
            train(make("parts", factors, evaluate=stop, **settings))
    parts = train(make("parts", factors, **settings))
    jax.tree.map(np.testing.assert_array_equal, parts.params, whole.params)
    assert records(make("parts", {})) == records(make("whole", {}))
    assert lines(make("parts", {})) == lines(make("whole", {}))
    assert [line["step"] for line in lines(make("parts", {}))] == [6, 8, 11]


def test_the_checkpoint_before_a_skipped_step_is_kept(make):
    settings = {"checkpoint_every": 2, "keep_last": 1, "keep_best": 0}
    job = make("run", {6: np.nan}, on_bad_step=Skip(), **settings)
    train(job)
    assert checkpoint_steps(job.folder) == [4, 12]


def test_too_many_in_a_row_stop_the_run(make):
    factors = dict.fromkeys((3, 5, 6, 7), np.nan)
    train(make("three", factors, on_bad_step=Skip(most=3)))
    with pytest.raises(UserError, match=r"at step 7 .* bad step number 3 in a row"):
        train(make("two", factors, on_bad_step=Skip(most=2)))


def test_the_median_of_the_last_good_steps():
    """`judge` against the same in NumPy, with bad steps among the good."""
    rng = np.random.default_rng(3)
    setting = Skip(loss_over=2.0, grad_norm_over=3.0, window=5)
    watch, good_ones = setting.begin(), []
    for step in range(1, 60):
        loss, norm = rng.gamma(2.0, 1.0, 2).astype(np.float32)
        loss = np.float32(np.inf) if step % 17 == 0 else loss
        expected = bool(np.isfinite(loss))
        if len(good_ones) >= 5:
            usual = np.median(np.asarray(good_ones[-5:]), axis=0)
            expected = expected and loss <= 2 * usual[0] and norm <= 3 * usual[1]
        good, watch = setting.judge(watch, jnp.int32(step), jnp.asarray(loss), jnp.asarray(norm))
        assert bool(good) == expected, step
        if expected:
            good_ones.append((loss, norm))
    assert int(watch.good) == len(good_ones)
    assert int(watch.count) == 59 - len(good_ones)
