"""Going on from the last good checkpoint, on whatever devices there are."""

import dataclasses
import json
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command_line import cut, flipped

from gemma_jax.errors import Interrupted, UserError
from gemma_jax.sharding import MeshConfig, make_layout
from gemma_jax.training.checkpoint import checkpoint_steps, load_params
from gemma_jax.training.fingerprint import fingerprints
from gemma_jax.training.loop import train
from gemma_jax.training.metrics import read_metrics

SPEEDS = ("tokens_per_s", "mfu", "data_wait")


def records(job):
    return [
        {name: x for name, x in line.items() if name not in SPEEDS}
        for line in read_metrics(job.folder)
    ]


def largest(folder):
    return max((p for p in folder.rglob("d/*") if p.is_file()), key=lambda p: p.stat().st_size)


def rewrite(pattern, change):
    def harm(place):
        path = largest(place / pattern) if "." not in pattern else place / pattern[:-1]
        path.write_bytes(change(path.read_bytes()))

    return harm


def edit(**changes):
    def harm(place):
        path = place / "check" / "metadata"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return harm


def of_another_step(place):
    shutil.rmtree(place)
    shutil.copytree(place.with_name("8"), place)


DAMAGE = {
    "array cut": (rewrite("params", cut), "is damaged"),
    "weights flipped": (rewrite("params", flipped), "is damaged"),
    "moments flipped": (rewrite("progress", flipped), "is damaged"),
    "array gone": (lambda place: largest(place / "params").unlink(), "is damaged"),
    "no description": (lambda place: (place / "params" / "_METADATA").unlink(), "is damaged"),
    "no progress": (lambda place: shutil.rmtree(place / "progress"), "is damaged"),
    "metrics cut": (rewrite("metrics/metrics.", cut), "its metrics cannot be read"),
    "position cut": (rewrite("data/metadata.", cut), "is damaged"),
    "check cut": (rewrite("check/metadata.", cut), "its check cannot be read"),
    "check gone": (lambda place: shutil.rmtree(place / "check"), "its fingerprints are missing"),
    "watch gone": (lambda place: shutil.rmtree(place / "watch"), "what it has seen of bad steps"),
    "other values": (edit(fingerprints={}), "is not what was written"),
    "another run": (edit(settings="another"), "is of another run"),
    "another step": (of_another_step, "it says that it is of step 8"),
}


@pytest.fixture(scope="module")
def stopped_at_12(tmp_path_factory):
    return tmp_path_factory.mktemp("restore") / "run"


# Orbax's other readers are cut off by the first that fails, and Python tells of each at some time.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("kind", DAMAGE)
def test_the_last_good_checkpoint_is_gone_on_from(make_job, stopped_at_12, capsys, kind):
    """The newest of three is harmed; the run ends with the bits of one that never was."""
    harm, why = DAMAGE[kind]
    settings = {"keep_last": 3, "log_every": 4, "settings": "mine"}
    if not stopped_at_12.exists():
        job = dataclasses.replace(make_job(steps=12, **settings), is_same="mine".__eq__)
        train(dataclasses.replace(job, folder=stopped_at_12))
    whole = load_params(stopped_at_12, jax.eval_shape(make_job().init_params))
    job = dataclasses.replace(make_job(steps=12, **settings), is_same="mine".__eq__)
    shutil.copytree(stopped_at_12, job.folder)
    place = job.folder / "checkpoints" / "12"
    harm(place)
    capsys.readouterr()
    again = train(job)
    said = capsys.readouterr().err
    assert f"the checkpoint {place} is" in said
    assert why in said
    assert "tiny: going on from step 8" in said
    jax.tree.map(np.testing.assert_array_equal, again.params, whole)
    assert (job.folder / "set_aside" / "12").is_dir()
    assert checkpoint_steps(job.folder) == [4, 8, 12]
    assert [line["step"] for line in read_metrics(job.folder)] == [4, 8, 12]


def test_an_older_one_whose_metrics_are_cut_is_moved_aside(make_job, capsys):
    """Orbax would not open the folder."""
    train(make_job(steps=8))
    (make_job().folder / "checkpoints/4/metrics/metrics").write_text("{")
    train(make_job(steps=12))
    assert "checkpoints/4 is damaged (its metrics cannot be read)" in capsys.readouterr().err
    assert checkpoint_steps(make_job().folder) == [8, 12]


def test_where_none_is_good_all_stay(make_job):
    train(make_job(steps=8))
    folder = make_job().folder / "checkpoints"
    for step in (4, 8):
        (folder / str(step) / "params" / "_METADATA").unlink()
    with pytest.raises(UserError, match="checkpoints/8 is damaged"):
        train(make_job(steps=8))
    assert checkpoint_steps(make_job().folder) == [4, 8]


def test_a_disk_that_is_away_is_no_beginning(make_job, tmp_path):
    folder = make_job().folder
    folder.mkdir()
    (folder / "checkpoints").symlink_to(tmp_path / "away")
    with pytest.raises(UserError, match=r"checkpoints is a link to .*away, which is not there"):
        train(make_job())
    (folder / "checkpoints").unlink()
    (folder / "checkpoints.json").write_text('{"checkpoints": 5}')
    with pytest.raises(UserError, match=r"checkpoints\.json does not say where"):
        train(make_job())


def test_a_run_without_its_checkpoints_says_that_it_begins_anew(make_job, capsys):
    """Lines that cannot be read are left out of what the run has written."""
    folder = make_job().folder
    folder.mkdir()
    line = json.dumps({"step": 7, "loss": 1.0}).encode()
    (folder / "metrics.jsonl").write_bytes(b"\x8b{\n" + line + b'\n[1]\n{"st')
    (folder / "bad_steps.jsonl").write_bytes(b"{x")
    train(make_job(steps=4))
    assert "had come to step 7, and begins anew" in capsys.readouterr().err
    assert read_metrics(folder)[-1]["step"] == 4


def test_weights_that_changed_are_not_used(make_job, params):
    train(make_job(steps=4))
    rewrite("params", flipped)(make_job().folder / "checkpoints" / "4")
    with pytest.raises(UserError, match="checkpoints/4 is damaged"):
        load_params(make_job().folder, params)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8", "bool"])
def test_a_fingerprint_is_of_each_bit_and_place(dtype):
    """Against sums in Python's own whole numbers."""
    x = jnp.asarray(np.random.default_rng(0).integers(0, 2, (3, 4, 5)), dtype)

    bits = np.asarray(x).ravel().view(f"uint{8 * x.dtype.itemsize}").tolist()
    by_hand = sum(value * (2 * place + 1) for place, value in enumerate(bits)) % 2**32
    assert fingerprints({"x": x}) == {"['x']": by_hand}
    sharded = jax.device_put(x.reshape(3, 20), make_layout(MeshConfig()).replicated())
    assert fingerprints({"x": sharded}) == {"['x']": by_hand}


MESHES = {
    "one": MeshConfig(data=1),
    "dp 8": MeshConfig(rules="dp"),
    "fsdp 8": MeshConfig(fsdp=8, data=1, rules="fsdp"),
    "2x2x2": MeshConfig(data=2, fsdp=2, tensor=2),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"), [("one", "fsdp 8"), ("fsdp 8", "dp 8"), ("dp 8", "2x2x2")]
)
def test_another_mesh_goes_on_with_the_same_numbers(make_job, before, after):
    """The curve is that of one device, and so is the place in the data."""

    def on(name, folder, **settings):
        config = MESHES[name]
        layout = make_layout(config, jax.devices()[:1] if name == "one" else None)
        job = make_job(folder, log_every=1, ema_decay=0.9, **settings)
        return dataclasses.replace(job, layout=layout)

    train(on("one", "whole"))

    def stop(params):
        os.kill(os.getpid(), signal.SIGINT)
        return {"bits_per_byte": 1.0, "loss": 1.0}

    with pytest.raises(Interrupted, match="step 7 of 12"):
        train(on(before, "parts", eval_every=7, evaluate=stop))
    train(on(after, "parts"))
    ours, theirs = records(on(after, "parts")), records(on("one", "whole"))
    assert [line["step"] for line in ours] == list(range(1, 13))
    for here, there in zip(ours, theirs, strict=True):
        names = ("loss", "grad_norm", "param_norm", "accuracy")
        assert {n: here[n] for n in names} == pytest.approx({n: there[n] for n in names}, rel=2e-5)
