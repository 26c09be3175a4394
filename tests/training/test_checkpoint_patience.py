"""Checkpoints on a file system that is away for a moment."""

import types

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from gemma_jax import files
from gemma_jax.errors import UserError
from gemma_jax.training import restore
from gemma_jax.training.checkpoint import checkpoint_steps, load_params
from gemma_jax.training.loop import train

AWAY = ValueError("Error writing ... os_error_code='5' ...")


@pytest.fixture(autouse=True)
def slept(monkeypatch):
    slept = []
    fake = types.SimpleNamespace(monotonic=lambda: sum(slept), sleep=slept.append)
    monkeypatch.setattr(files, "time", fake)
    return slept


def failing_at(monkeypatch, method, at, error=AWAY):
    """Calls of a method of Orbax's manager that fail, by their numbers."""
    real, calls = getattr(ocp.CheckpointManager, method), []

    def sometimes(self, *arguments, **settings):
        calls.append(None)
        if len(calls) in at:
            raise error
        return real(self, *arguments, **settings)

    monkeypatch.setattr(ocp.CheckpointManager, method, sometimes)


@pytest.mark.parametrize(
    ("method", "at"),
    [("save", {1}), ("save", {2, 3}), ("wait_until_finished", {1, 2})],
)
def test_a_checkpoint_is_written_again(make_job, monkeypatch, slept, method, at):
    """`wait_until_finished` is where a write in the background tells that it failed."""
    failing_at(monkeypatch, method, at)
    job = make_job()
    trained = train(job)
    assert slept
    assert checkpoint_steps(job.folder)[-1] == 12
    jax.tree.map(
        np.testing.assert_array_equal, load_params(job.folder, trained.params), trained.params
    )


@pytest.mark.parametrize("method", ["save", "wait_until_finished"])
def test_a_full_disk_stops_the_run_with_its_last_checkpoint(make_job, monkeypatch, slept, method):
    full = ValueError("Error writing ... os_error_code='28' ...")
    failing_at(monkeypatch, method, {3}, full)
    job = make_job()
    with pytest.raises(UserError, match=r"checkpoints: the disk is full; free some space"):
        train(job)
    assert slept == []
    assert checkpoint_steps(job.folder)[-1] in (4, 8)
    monkeypatch.undo()
    train(job)
    assert checkpoint_steps(job.folder)[-1] == 12


def test_patience_ends_and_the_last_checkpoint_stays(make_job, monkeypatch):
    failing_at(monkeypatch, "save", set(range(2, 1000)))
    job = make_job()
    with pytest.raises(UserError, match=r"checkpoints: Input/output error, for \d+ seconds"):
        train(job)
    assert checkpoint_steps(job.folder) == [4]


def test_a_checkpoint_that_cannot_be_read_now_is_not_damaged(make_job, monkeypatch):
    train(make_job(steps=8))
    real, calls = restore.read_item, []

    def away(*arguments):
        calls.append(None)
        if len(calls) <= limit:
            raise AWAY
        return real(*arguments)

    monkeypatch.setattr(restore, "read_item", away)
    limit = 1000
    with pytest.raises(UserError, match=r"cannot read .*: Input/output error, for"):
        train(make_job(steps=12))
    limit = len(calls) + 3
    train(make_job(steps=12))
    assert not (make_job().folder / "set_aside").exists()
    assert checkpoint_steps(make_job().folder) == [4, 8, 12]
