"""The loop: exact resume, what is kept, what is logged, when it stops."""

import dataclasses
import json
import os
import signal
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_jax.errors import Interrupted, Preempted, UserError
from gemma_jax.training.checkpoint import checkpoint_steps, load_params
from gemma_jax.training.loop import train
from gemma_jax.training.metrics import FILE, MetricsLog, read_metrics
from gemma_jax.training.optim import AdamW, Muon

SPEEDS = ("tokens_per_s", "mfu", "data_wait")


def without_speeds(folder):
    return [
        {name: value for name, value in record.items() if name not in SPEEDS}
        for record in read_metrics(folder)
    ]


def interrupting(step_of_interest, number=signal.SIGINT):
    """An evaluation that asks for a stop the way Ctrl-C does, in the n-th call."""
    calls = []

    def evaluate(params):
        calls.append(None)
        if len(calls) == step_of_interest:
            os.kill(os.getpid(), number)
        return {"bits_per_byte": 1.0, "loss": 1.0}

    return evaluate


@pytest.mark.parametrize(
    ("stops", "settings"),
    [((5, 10), {"ema_decay": 0.9, "microbatches": 2}), ((5,), {"optimizer": Muon()})],
    ids=["adamw", "muon"],
)
def test_an_interrupted_run_goes_on_to_the_same_bits(make_job, stops, settings):
    """Stopped off the intervals of logs and checkpoints, and once within a run that was resumed."""
    settings = {"eval_every": 5, **settings}
    whole = train(make_job("whole", **settings))
    for step in stops:
        with pytest.raises(Interrupted, match=f"step {step} of 12"):
            train(make_job("parts", evaluate=interrupting(1), **settings))
        assert checkpoint_steps(make_job("parts").folder)[-1] == step
    parts = train(make_job("parts", **settings))
    jax.tree.map(np.testing.assert_array_equal, parts.params, whole.params)
    assert without_speeds(make_job("parts").folder) == without_speeds(make_job("whole").folder)
    saved = load_params(make_job("parts").folder, whole.params)  # the average where one is kept
    jax.tree.map(np.testing.assert_array_equal, saved, whole.params)


def test_a_crash_goes_back_to_the_last_checkpoint_and_drops_later_records(make_job):
    whole = train(make_job("whole", log_every=1))

    def crash(params):
        if read_metrics(make_job("parts").folder)[-1]["step"] == 7:
            raise RuntimeError("power cut")
        return {"bits_per_byte": 1.0, "loss": 1.0}

    with pytest.raises(RuntimeError, match="power cut"):
        train(make_job("parts", log_every=1, evaluate=crash))
    folder = make_job("parts").folder
    with (folder / FILE).open("a") as file:
        file.write('{"step": 8, "lo')  # cut off in the middle
    parts = train(make_job("parts", log_every=1))
    jax.tree.map(np.testing.assert_array_equal, parts.params, whole.params)
    assert [record["step"] for record in read_metrics(folder)] == list(range(1, 13))
    assert without_speeds(folder) == without_speeds(make_job("whole").folder)


def test_a_finished_run_trains_no_more(make_job):
    first = train(make_job())
    before = (make_job().folder / FILE).read_text()
    again = train(make_job())
    jax.tree.map(np.testing.assert_array_equal, again.params, first.params)
    assert (make_job().folder / FILE).read_text() == before


@pytest.mark.parametrize("kept", [0, -1])
def test_lost_metrics_of_a_finished_run_are_measured_again(make_job, kept):
    """A checkpoint of the last step whose lines did not reach the disk, all or the last of them."""
    scores = iter([3.0, 2.0, 1.0, 1.5])
    evaluate = lambda params: {"bits_per_byte": next(scores), "loss": 1.0}  # noqa: E731
    assert train(make_job(evaluate=evaluate)).metrics["valid/bits_per_byte"] == 1.0
    path = make_job().folder / FILE
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:kept]))
    assert train(make_job(evaluate=evaluate)).metrics["valid/bits_per_byte"] == 1.5
    assert read_metrics(make_job().folder)[-1]["step"] == 12


def test_who_has_stopped_it_is_told(make_job):
    """Ctrl-C is the user; SIGTERM is the machine, and the same command is to be started again."""
    with pytest.raises(Preempted):
        train(make_job(evaluate=interrupting(1, signal.SIGTERM)))
    with pytest.raises(Interrupted) as stop:
        train(make_job(evaluate=interrupting(1)))
    assert not isinstance(stop.value, Preempted)


def test_weights_and_biases_go_on_in_the_same_run(make_job, monkeypatch):
    """Against a stand-in for the package, which is an optional one."""
    package = types.ModuleType("wandb")
    started, logged = [], []
    package.init = lambda **settings: started.append(settings) or package
    package.log = lambda values, step: logged.append(step)
    package.finish = lambda: logged.append("end")
    monkeypatch.setitem(sys.modules, "wandb", package)
    settings = {"wandb_project": "mine", "settings": {"seed": 3}}
    with pytest.raises(Interrupted):
        train(make_job(evaluate=interrupting(1), **settings))
    train(make_job(**settings))
    assert logged == [2, 4, "end", 6, 8, 10, 12, "end"]
    assert started[0] == started[1]
    wanted = {"project": "mine", "name": "tiny", "resume": "allow", "config": {"seed": 3}}
    assert wanted.items() <= started[0].items()
    assert started[0]["id"] not in (None, "tiny")

    def refuse(**_):
        raise RuntimeError("api_key not configured.\nmore")

    package.init = refuse
    with pytest.raises(UserError, match=r"\(api_key not configured\); log in"):
        train(make_job("new", **settings))
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="GEMMA_JAX_EXTRA=cpu,wandb"):
        train(make_job("none", **settings))


def test_the_last_and_the_best_checkpoint_are_kept_through_a_resume(make_job):
    """Validation is best at step 2; the run is stopped at 6 and goes on to 12."""

    def measured(values, stop=False):
        values = iter(values)

        def evaluate(params):
            value = next(values)
            if stop and value == 3.0:
                os.kill(os.getpid(), signal.SIGTERM)
            return {"bits_per_byte": value, "loss": 1.0}

        return evaluate

    settings = {"eval_every": 2, "checkpoint_every": 2, "keep_last": 1}
    with pytest.raises(Interrupted):
        train(make_job(evaluate=measured([1.0, 2.0, 3.0], stop=True), **settings))
    assert checkpoint_steps(make_job().folder) == [2, 6]
    assert train(make_job(evaluate=measured([2.5, 2.6, 2.7]), **settings)).best_step == 2
    assert checkpoint_steps(make_job().folder) == [2, 12]


def test_a_loss_that_is_not_finite_stops_before_it_is_saved(make_job):
    """The checkpoint of step 3 falls between two logged steps and would hold the NaN."""
    optimizer = AdamW(learning_rate=1e30, clip_norm=None)
    job = make_job(optimizer=optimizer, log_every=100, checkpoint_every=3, eval_every=100)
    with pytest.raises(UserError, match=r"Lower optimizer\.learning_rate"):
        train(job)
    assert checkpoint_steps(job.folder) == []


def test_weights_of_another_model_or_step_are_refused(make_job, params):
    job = make_job(steps=4)
    train(job)
    with pytest.raises(UserError, match=r"no checkpoint of step 3; it has \[4\]"):
        load_params(job.folder, params, step=3)
    other = jax.tree.map(lambda x: jax.ShapeDtypeStruct((*x.shape, 1), x.dtype), params)
    with pytest.raises(UserError, match="another model: parameter"):
        load_params(job.folder, other)
    with pytest.raises(UserError, match="holds no checkpoint"):
        load_params(job.folder / "nothing", params)


def test_a_checkpoint_of_another_model_is_not_gone_on_from(make_job, params):
    train(make_job(steps=4))
    other = jax.tree.map(lambda x: jnp.zeros((*x.shape[:-1], 8), x.dtype), params)
    job = dataclasses.replace(make_job(), init_params=lambda: other)
    with pytest.raises(UserError, match="another model: parameter"):
        train(job)


@pytest.mark.parametrize(
    ("file", "content"),
    [("metrics/metrics", '{"a'), ("data/metadata", "{}"), ("data/metadata", "[]")],
)
def test_a_damaged_checkpoint_is_one_sentence(make_job, file, content):
    train(make_job(steps=4))
    (make_job().folder / "checkpoints/4" / file).write_text(content)
    with pytest.raises(UserError, match=r"checkpoints/4 is damaged \(.*\); copy it"):
        train(make_job())


def test_a_resumed_run_says_where_it_goes_on(make_job, capsys):
    train(make_job(steps=4))
    assert "going on" not in capsys.readouterr().err
    train(make_job(steps=8))
    assert "tiny: going on from step 4\n" in capsys.readouterr().err


def test_the_position_of_the_stream_does_not_depend_on_hosts(make_job):
    """One JSON file for all hosts: no file is named by a process."""
    job = make_job(steps=4)
    train(job)
    files = [path for path in (job.folder / "checkpoints/4/data").rglob("*") if path.is_file()]
    states = [json.loads(path.read_text()) for path in files if path.name == "metadata"]
    assert states == [{"next_index": 4}]


def test_only_the_first_host_writes_metrics(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    log = MetricsLog(tmp_path, 0, None, "run")
    log.write(1, {"loss": 1.0})
    log.close()
    assert list(tmp_path.iterdir()) == []
