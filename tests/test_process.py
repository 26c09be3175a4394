"""The command as a process: what it prints when things go wrong, how it stops and goes on."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from command_line import BUILD, command, cut, ended, environment, write_inputs


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a token set and a finished run."""
    folder = tmp_path_factory.mktemp("process")
    write_inputs(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for line in (BUILD, "train exp.py"):
            process = ended(command(*line.split()))
            assert process.returncode == 0, process.stderr
    return folder


@pytest.fixture
def sandbox(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that folder to work in."""
    shutil.copytree(trained, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


@pytest.mark.parametrize("argv", [("--help",), ("nonsense",)])
def test_help_needs_no_jax(argv: tuple[str, ...]) -> None:
    code = "import sys; from gemma_jax.cli import main\ntry: main(sys.argv[1:])\nfinally: "
    code += "assert not {'jax', 'numpy', 'flax'} & sys.modules.keys()"
    process = ended([sys.executable, "-c", code, *argv])
    assert process.returncode == (0 if argv == ("--help",) else 2), process.stderr
    assert "Traceback" not in process.stderr


@pytest.mark.parametrize(
    ("line", "words", "pattern"),
    [
        ("generate runs/tiny --prompt a", "give another one of the run", "4/params/**/d/*"),
        ("generate runs/tiny --prompt a", "give another one of the run", "4/params/ocdbt*/d/*"),
        ("train exp.py", "delete that folder to go on", "*/params/ocdbt*/d/*"),
        ("train exp.py", "delete that folder to go on", "*/progress/ocdbt*/d/*"),
    ],
)
def test_damaged_weights(sandbox: Path, line: str, words: str, pattern: str) -> None:
    """Every file of the arrays cut, or large ones alone: each is told in another way."""
    for path in sandbox.glob(f"runs/tiny/checkpoints/{pattern}"):
        if "**" in pattern or path.stat().st_size > 2000:
            path.write_bytes(cut(path.read_bytes()))
    Path("runs/tiny/result.json").unlink()  # so that `train` goes on
    process = ended(command(*line.split()))
    assert process.returncode == 2
    assert process.stdout == ""
    assert len(process.stderr.splitlines()) == 1
    assert re.search(r"checkpoints/4 is damaged( \(.*\))?; copy it again", process.stderr)
    assert words in process.stderr


def test_a_damaged_checkpoint_leaves_the_one_before(sandbox: Path) -> None:
    for path in sandbox.glob("runs/tiny/checkpoints/4/params/ocdbt*/d/*"):
        path.write_bytes(cut(path.read_bytes()))
    result = json.loads(Path("runs/tiny/result.json").read_text())
    Path("runs/tiny/result.json").unlink()
    process = ended(command("train", "exp.py", "--json"))
    assert process.returncode == 0, process.stderr
    assert untimed(json.loads(process.stdout)) == untimed(result)
    left, on = process.stderr.splitlines()[:2]
    assert left.startswith("the checkpoint runs/tiny/checkpoints/4 is damaged (")
    assert "moved to runs/tiny/set_aside/4, and the run goes on from step 2" in left
    assert on == "tiny: going on from step 2"


@pytest.mark.slow
def test_a_folder_is_trained_by_one_process(sandbox: Path) -> None:
    """The second one is refused while the first one lives, and goes on when it was killed."""
    line = "train exp.py --set train.checkpoint_every=40 --arg tokens=102400 --arg name=stopped"
    with subprocess.Popen(
        command(*line.split()), env=environment(), stderr=subprocess.PIPE
    ) as first:
        while not Path("runs/stopped/metrics.jsonl").exists():
            assert first.poll() is None
            time.sleep(0.01)
        second = ended(command(*line.split()))
        assert first.poll() is None
        first.kill()
    assert second.returncode == 2
    assert second.stderr == (
        f"error: runs/stopped is being trained by process {first.pid}; wait for it, or stop it.\n"
    )
    assert ended(command(*line.split())).returncode == 0


@pytest.mark.slow
def test_python_is_not_told_what_libraries_do(sandbox: Path) -> None:
    """A run whose first checkpoint is not validated, and what one does with it afterwards."""
    code = "from gemma_jax import trained, experiment, experiment_file, settings\n"
    code += "base = experiment_file.load_file('exp.py', {'name': 'python'})['BASE']\n"
    code += "experiment.run(base); print(trained.evaluate(base.folder, data='tokens'))"
    process = ended([sys.executable, "-c", code])
    assert "WARNING" not in process.stderr
    assert "np.float64" not in process.stdout
    assert process.returncode == 0


@pytest.mark.slow
def test_a_checkpoint_that_the_disk_refuses(sandbox: Path) -> None:
    """The limit of a file's size stands in for a full disk, and the same command goes on."""
    argv = command("train", "exp.py", "--arg", "name=refused", "--set", "model.mlp_dim=2048")
    process = ended(["bash", "-c", 'ulimit -f 512 && exec "$@"', "-", *argv])
    assert process.returncode == 2
    assert process.stdout == ""
    assert len(process.stderr.splitlines()) == 1
    assert process.stderr.startswith("error: cannot write runs/refused/checkpoints: ")
    assert ended(argv).returncode == 0


@pytest.mark.slow
def test_interrupted_training_goes_on(sandbox: Path) -> None:
    """Killed, then interrupted, then left alone: the numbers are those of one go."""
    settings = "--set train.checkpoint_every=40 --set train.eval_every=100"
    line = f"train exp.py --json {settings} --arg tokens=102400 --arg name="
    whole = ended(command(*f"{line}whole".split()))
    assert whole.returncode == 0, whole.stderr

    code, _, err = stopped(f"{line}stopped", signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert err == ""
    code, out, err = stopped(f"{line}stopped", signal.SIGINT)
    assert code == 130, err
    assert out == ""
    said = r"stopped: going on from step \d+\n\nstopped stopped at step \d+ of 400 and is saved"
    assert re.fullmatch(rf"{said}; .*\.\n", err)
    assert not Path("runs/stopped/result.json").exists()

    resumed = ended(command(*f"{line}stopped".split()))
    assert resumed.returncode == 0, resumed.stderr
    assert untimed(json.loads(resumed.stdout)) == untimed(json.loads(whole.stdout))
    assert metrics("stopped") == metrics("whole")


def stopped(line: str, number: signal.Signals) -> tuple[int, str, str]:
    """Sends a signal once there is a new checkpoint; gives exit code, stdout and stderr."""
    checkpoints = Path("runs/stopped/checkpoints")
    before = set(checkpoints.glob("[0-9]*"))
    with subprocess.Popen(
        command(*line.split()),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        deadline = time.monotonic() + 60
        while not {path for path in checkpoints.glob("[0-9]*") if path.name.isdigit()} - before:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def metrics(name: str) -> list[dict[str, Any]]:
    lines = Path(f"runs/{name}/metrics.jsonl").read_text().splitlines()
    return [untimed(json.loads(line)) for line in lines]


def untimed(values: dict[str, Any]) -> dict[str, Any]:
    """What two runs of the same settings must share: all but their name and their speed."""
    own = ("name", "wall_s", "tokens_per_s", "mfu", "data_wait")
    return {
        key: untimed(x) if isinstance(x, dict) else x for key, x in values.items() if key not in own
    }


def test_a_step_is_run_once_more(sandbox: Path) -> None:
    """Its numbers are those of the run, from the checkpoint before it as from the beginning."""
    run = "train exp.py --json --set train.log_every=1 --arg name=watched"
    assert ended(command(*run.split())).returncode == 0
    files = {p: p.read_bytes() for p in Path("runs/watched").rglob("*") if p.is_file()}
    for step, begin in ((2, 0), (4, 2)):
        process = ended(command(*f"{run} --replay {step}".split()))
        assert process.returncode == 0, process.stderr
        seen, line = json.loads(process.stdout), metrics("watched")[step - 1]
        assert seen["from_step"] == begin
        assert [seen["loss"], seen["grad_norm"]] == [line["loss"], line["grad_norm"]]
        assert seen["sequences"] == list(range(8 * step - 8, 8 * step))
        assert sum(x * x for x in seen["gradient_norms"].values()) == pytest.approx(
            line["grad_norm"] ** 2, rel=1e-4
        )
        assert seen["not_finite"] == {"parameter": None, "activation": None, "gradient": None}
    assert files == {p: p.read_bytes() for p in Path("runs/watched").rglob("*") if p.is_file()}
    process = ended(command(*f"{run} --replay 5".split()))
    assert process.stderr == "error: --replay 5 is outside of the run's steps, 1 to 4.\n"


def test_where_a_step_goes_wrong_is_told(sandbox: Path) -> None:
    """A learning rate that ruins the weights in one step: the next one finds them so."""
    line = "train exp.py --set optimizer.learning_rate=1e38 --set optimizer.clip_norm=None"
    line += " --set train.log_every=1 --arg name=ruined"
    process = ended(command(*line.split()))
    assert process.returncode == 2
    process = ended(command(*f"{line} --replay 2".split()))
    assert process.returncode == 0, process.stderr
    told = process.stdout[process.stdout.index("first that is not finite") :].split()
    assert "parameter none" in " ".join(told)
    assert re.search(r"activation (embedding|layer \d|final norm)", " ".join(told)), told
