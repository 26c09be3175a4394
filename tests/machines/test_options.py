"""The options of each action are frozen, like those of all verbs; and none needs jax."""

import sys

import pytest
from command_line import ended, options_of

from gemma_jax import arguments, cli
from gemma_jax.errors import PREEMPTED_CODE, Interrupted, Preempted

SLICE = {"--dry-run", "--project", "--zone"}
ASKED = {"--json", "--runtime-version", "--spot", "--type"}
TPU_JOB = {"--bucket", "--keep", "--max-restarts", "--poll-s", *ASKED, *SLICE}
GKE = {"--cluster", *SLICE}
GKE_JOB = {
    *("--image", "--keep", "--max-restarts", "--mount", "--num-slices", "--priority"),
    *("--storage", "--type", *GKE),
}
SLURM_JOB = {
    *("--account", "--cpus", "--dry-run", "--gpus", "--keep", "--max-restarts", "--nodes"),
    *("--partition", "--sbatch", "--time"),
}
ACTIONS = {
    "tpu": {
        "create": SLICE | ASKED,
        "run": TPU_JOB,
        "sweep": TPU_JOB | {"--slices"},
        "logs": SLICE | {"--worker"},
        "status": SLICE | {"--json"},
        "stop": SLICE,
        "delete": SLICE,
    },
    "gke": {
        "run": GKE_JOB,
        "sweep": GKE_JOB,
        "logs": GKE | {"--follow"},
        "status": GKE,
        "stop": GKE,
    },
    "slurm": {
        "run": SLURM_JOB,
        "sweep": SLURM_JOB | {"--at-once"},
        "logs": {"--dry-run", "--worker"},
        "status": {"--dry-run"},
        "stop": {"--dry-run"},
    },
}


def test_actions_and_options_are_frozen() -> None:
    (verbs,) = (a.choices for a in arguments.parser()._actions if isinstance(a.choices, dict))
    assert {name: options_of(verbs[name]) for name in ACTIONS} == ACTIONS


@pytest.mark.parametrize(
    "line",
    [
        "tpu stop demo --zone z --dry-run",
        "gke stop demo --cluster c --zone z --dry-run",
        "slurm stop demo --dry-run",
    ],
)
def test_a_laptop_needs_no_jax(line: str) -> None:
    code = "import sys; from gemma_jax.cli import main; main(sys.argv[1:]); "
    code += "assert not {'jax', 'numpy', 'flax'} & sys.modules.keys()"
    process = ended([sys.executable, "-c", code, *line.split()])
    assert process.returncode == 0, process.stderr
    assert process.stdout


@pytest.mark.parametrize(("kind", "code"), [(Preempted, PREEMPTED_CODE), (Interrupted, 130)])
def test_the_exit_code_says_whether_to_start_again(kind, code, monkeypatch, capsys) -> None:
    def stopped(*_: object) -> None:
        raise kind("saved; the same command goes on.")

    monkeypatch.setitem(cli._VERBS, "slurm", stopped)
    with pytest.raises(SystemExit) as ended:
        cli.main(["slurm", "status", "demo"])
    assert ended.value.code == code
    assert capsys.readouterr().err == "\nsaved; the same command goes on.\n"
