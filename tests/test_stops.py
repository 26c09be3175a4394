"""A signal to one of several processes stops all of them alike, and nothing is lost."""

import json
import shutil
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from command_line import BUILD, command, ended, write_inputs
from together import end_together, ends, start_together

from gemma_jax import runs
from gemma_jax.errors import INTERRUPTED_CODE, PREEMPTED_CODE
from gemma_jax.training.checkpoint import checkpoint_steps

STEPS, DEVICES = 60, 2
TRAIN = (
    f"train exp.py --arg tokens={256 * STEPS} --set train.checkpoint_every=1000 "
    "--set train.eval_every=30 --set mesh.fsdp=2 --arg name="
)
SPEEDS = ("tokens_per_s", "mfu", "data_wait")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stops")
    write_inputs(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert ended(command(*BUILD.split())).returncode == 0
    return folder


def train(folder, name, count):
    for code, _, err in end_together(folder, f"{TRAIN}{name}".split(), count, DEVICES):
        assert code == 0, err


@pytest.fixture(scope="module")
def whole(inputs):
    """The run of two processes that nothing stops."""
    train(inputs, "whole", 2)
    return inputs / "runs" / "whole"


def stop(folder, name, number, target, once="metrics.jsonl"):
    """Signals one of two processes once a file of their run has content; gives what they say."""
    started = start_together(folder, f"{TRAIN}{name}".split(), 2, DEVICES)
    log, deadline = folder / "runs" / name / once, time.monotonic() + 120
    while not (log.exists() and log.read_text()):
        assert time.monotonic() < deadline
        assert all(one.poll() is None for one in started), ends(started)
        time.sleep(0.01)
    started[target].send_signal(number)
    return ends(started)


def records(run: Path):
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{name: x for name, x in line.items() if name not in SPEEDS} for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "target", "code"),
    [
        (signal.SIGTERM, 1, PREEMPTED_CODE),
        (signal.SIGTERM, 0, PREEMPTED_CODE),
        (signal.SIGINT, 1, INTERRUPTED_CODE),
    ],
)
def test_one_signal_stops_all_at_the_same_step(inputs, whole, number, target, code):
    """The same processes then go on to the same bits; a single one to the same numbers."""
    name = f"stopped_{number.name}_{target}"
    said = stop(inputs, name, number, target)
    assert [one for one, _, _ in said] == [code, code], said
    run = inputs / "runs" / name
    (step,) = checkpoint_steps(run)
    assert 0 < step < STEPS
    assert all(f"stopped at step {step} of {STEPS} and is saved" in err for _, _, err in said)
    assert not (run / "result.json").exists()
    if code != PREEMPTED_CODE or target != 1:
        return
    elsewhere = Path(shutil.copytree(inputs, inputs.with_name("elsewhere")))
    train(inputs, name, 2)
    assert records(run) == records(whole)
    ours, theirs = (runs.load_model(folder).params for folder in (run, whole))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    result = json.loads((run / "result.json").read_text())
    assert result["metrics"].items() >= records(whole)[-1].items()

    train(elsewhere, name, 1)
    for here, there in zip(records(elsewhere / "runs" / name), records(whole), strict=True):
        assert here == pytest.approx(there, rel=1e-5)


@pytest.mark.slow
def test_before_the_first_step_all_stop_at_once(inputs):
    """While the model is compiled, or wherever each of them is by then."""
    said = stop(inputs, "early", signal.SIGTERM, 1, once="model.json")
    assert [code for code, _, _ in said] == [PREEMPTED_CODE] * 2, said
    assert all("the same command goes on" in err for _, _, err in said)
    assert not any("Traceback" in err for _, _, err in said)
