"""GKE over a stand-in of xpk, SLURM over stand-ins of sbatch and, for its script, of srun."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from gemma_jax.errors import PREEMPTED_CODE

GKE = "gke run demo --cluster c --zone z --type v5litepod-16"
SHARED = "--storage s --mount /shared"
# Runs each process after the other, as srun would beside each other.
SRUN = """#!/bin/bash
options=()
while [[ $1 == --* ]]; do options+=("$1"); shift; done
highest=0
for SLURM_PROCID in 0 1; do
  export SLURM_PROCID
  for option in "${options[@]}"; do
    if [[ $option == --output=* ]]; then log=${option#*=}; log=${log//%t/$SLURM_PROCID}; fi
  done
  "$@" >>"$log" 2>&1
  code=$?
  ((code > highest)) && highest=$code
done
exit $highest
"""
LAUNCH = """#!/bin/bash
echo "$SLURM_PROCID: $* in ${PWD##*/} with $GEMMA_JAX_EXTRA, ${PYTHONPATH##*/}"
if [[ ! -e runs/there ]]; then exit 9; fi
codes=($CODES)
exit "${codes[SLURM_PROCID]}"
"""


def test_a_workload_of_several_slices(cloud, run) -> None:
    line = f"{GKE} --num-slices 2 --priority high --project p {SHARED} -- train mine.py"
    code, _, err = run(line)
    assert code == 0, err
    (call,) = cloud.calls
    (place,) = [word for word in call if word.startswith("--script-dir=")]
    call.remove(place)
    assert call == [
        *("xpk", "workload", "create", "--workload=demo", "--cluster=c", "--zone=z"),
        *("--project=p", "--tpu-type=v5litepod-16", "--num-slices=2", "--storage=s"),
        *("--priority=high", "--max-restarts=100", "--restart-on-exit-codes=75"),
        *("--termination-grace-period-seconds=120", "--base-docker-image=python:3.12"),
        "--command=set -e; mkdir -p /shared/runs .; ln -sfn /shared/runs runs; "
        "export GEMMA_JAX_EXTRA=tpu; exec ./launch.sh train mine.py --distributed",
    ]


def test_a_sweep_on_gke_is_a_workload_a_point(cloud, run, monkeypatch) -> None:
    monkeypatch.setattr("gemma_jax.cli_machines._points", lambda command: ["a", "b c"])
    line = f"{GKE.replace('run', 'sweep')} {SHARED} --dry-run -- mine.py"
    code, out, _ = run(line)
    assert code == 0
    first, second = out.splitlines()
    assert "--workload=demo-0 " in first
    assert first.endswith("exec ./launch.sh sweep mine.py --distributed --only a'")
    assert "--workload=demo-1 " in second
    assert cloud.calls == []


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (f"{GKE} -- train mine.py", "give --storage and --mount"),
        (f"{GKE} --storage s --mount x -- train mine.py", "--mount x must be a path from the root"),
        (f"{GKE} --storage s -- train mine.py", "go together"),
        (f"{GKE.replace('v5litepod', 'v9')} {SHARED} -- train mine.py", "v9-16"),
        (f"{GKE} {SHARED} -- train ignored.py", "would not reach"),
        ("slurm run Demo -- train mine.py", "'Demo' cannot name a job"),
        ("slurm run demo -- train nowhere.py", "nowhere.py does not exist"),
        ("slurm run demo --nodes 0 -- train mine.py", "--nodes: 0"),
        ("slurm logs demo", "has no log of process 0"),
    ],
)
def test_a_mistake_is_one_sentence(cloud, run, line, said) -> None:
    code, out, err = run(line)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert said in err
    assert cloud.calls == []


def test_what_xpk_refuses(cloud, run) -> None:
    cloud.answer({"xpk": [(1, "", "")]})
    code, _, err = run(f"{GKE} {SHARED} -- train mine.py")
    assert (code, err) == (2, "error: xpk did not take demo; its message is above.\n")
    assert run("gke status demo --cluster c --zone z")[0] == 1
    (cloud.folder / "xpk").unlink()
    code, _, err = run("gke stop demo --cluster c --zone z")
    assert code == 2
    assert err.startswith("error: xpk is not on this machine; install it (uv tool install xpk")


def test_the_other_commands_of_gke_and_slurm(cloud, run) -> None:
    for line in ("logs demo --follow", "status demo", "stop demo"):
        assert run(f"gke {line} --cluster c --zone z")[0] == 0
    for line in ("status demo", "stop demo"):
        assert run(f"slurm {line}")[0] == 0
    logs, listed, deleted, queue, *cancelled = (" ".join(argv) for argv in cloud.calls)
    assert logs == (
        "kubectl logs --selector=jobset.sigs.k8s.io/jobset-name=demo --prefix --tail=100 "
        "--max-log-requests=64 --follow"
    )
    assert listed == "xpk workload list --cluster=c --zone=z --filter-by-job=demo"
    assert deleted == "xpk workload delete --workload=demo --cluster=c --zone=z --force"
    assert queue.startswith("squeue --user=")
    assert "--name=demo --format=" in queue
    assert [line.split("--name=")[1] for line in cancelled] == [
        *("demo --state=PENDING", "demo --signal=INT"),
    ]


def test_a_job_and_an_array(cloud, run, checkout, monkeypatch) -> None:
    cloud.answer({"sbatch": ["17\n"]})
    line = "slurm run demo --nodes 2 --partition gpu --time 12:00:00 --sbatch=--mem=0"
    code, out, err = run(f"{line} -- train mine.py")
    assert code == 0, err
    assert out == "job 17; its logs are in runs/.jobs/demo/logs\n"
    folder = checkout / "runs/.jobs/demo"
    common = [
        *("sbatch", "--parsable", "--job-name=demo", "--nodes=2", "--ntasks-per-node=1"),
        *("--gpus-per-node=8", "--cpus-per-task=16", "--requeue", "--signal=B:TERM@120"),
        "--open-mode=append",
    ]
    assert cloud.calls[0] == [
        *(*common, f"--output={folder}/logs/%j.out", "--partition=gpu", "--time=12:00:00"),
        *("--mem=0", f"{folder}/job.sh"),
    ]
    monkeypatch.setattr("gemma_jax.cli_machines._points", lambda command: ["a", "b"])
    code, _, err = run("slurm sweep demo --nodes 2 --at-once 1 -- mine.py")
    assert code == 0, err
    assert cloud.calls[1] == [
        *(*common, f"--output={folder}/logs/%A_%a.out", "--array=0-1%1", f"{folder}/job.sh"),
    ]
    assert run("slurm run demo --dry-run -- train mine.py")[1].startswith("sbatch --parsable")
    assert len(cloud.calls) == 2


@pytest.fixture
def script(cloud, run, checkout, tmp_path, monkeypatch):
    """Runs the script of an array's second job with stand-ins; gives its exit code and output."""
    (checkout / "launch.sh").write_text(LAUNCH)
    (checkout / "launch.sh").chmod(0o755)
    (checkout / "runs").mkdir()
    (checkout / "runs/there").touch()
    monkeypatch.setattr("gemma_jax.cli_machines._points", lambda command: ["a", "b c"])
    assert run("slurm sweep demo --nodes 2 --max-restarts 3 -- mine.py")[0] == 0
    tools = tmp_path / "slurm"
    tools.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", '#!/bin/sh\necho scontrol "$@"\n')):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)

    def script(codes: str, **more: str) -> tuple[int, str]:
        array = {"SLURM_JOB_ID": "18", "SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "1"}
        env = {"PATH": f"{tools}:/usr/bin:/bin", "CODES": codes, **array, **more}
        done = subprocess.run(
            ["bash", checkout / "runs/.jobs/demo/job.sh"], env=env, capture_output=True, text=True
        )
        assert done.stderr == ""
        return done.returncode, done.stdout

    return script


def test_the_script_runs_one_point_on_every_node(script, checkout: Path, run) -> None:
    """In a copy of the code, with the kept folders of the checkout."""
    assert script("0 0") == (0, "")
    words = "sweep mine.py --distributed --only b c"
    (copy,) = (
        path.name for path in (checkout / "runs/.jobs/demo").iterdir() if len(path.name) == 16
    )
    _, out, _ = run("slurm logs demo --worker 1")
    assert out == f"1: {words} in {copy} with cuda, {copy}\n"
    assert os.path.samefile(checkout / "runs", checkout / f"runs/.jobs/demo/{copy}/runs")


def test_the_script_queues_itself_again_after_a_preemption(script) -> None:
    both = f"{PREEMPTED_CODE} {128 + signal.SIGTERM}"  # the second did not listen yet
    code, out = script(both, SLURM_RESTART_COUNT="2")
    assert (code, out.splitlines()[-1]) == (0, "scontrol requeue 17_1")
    code, out = script(both, SLURM_RESTART_COUNT="3")
    assert code == PREEMPTED_CODE
    assert "scontrol" not in out


def test_the_script_shows_the_log_of_the_process_that_failed(script) -> None:
    code, out = script("0 4")
    assert code == 4
    first, second = out.splitlines()
    assert first == "process 1 of job 17_1 ended with exit code 4; the end of its log:"
    assert second.startswith("1: sweep mine.py")


def test_the_script_hands_a_notice_on_and_waits_for_the_program(script, tmp_path: Path) -> None:
    """SLURM sends SIGTERM to the script alone; here srun does, and ends as it is told."""
    srun = "#!/bin/bash\ntrap 'sleep 0.2; exit 75' TERM\nkill -TERM $PPID\n"
    (tmp_path / "slurm" / "srun").write_text(srun + "while :; do sleep 0.02; done\n")
    code, out = script("")
    assert (code, out.splitlines()[-1]) == (0, "scontrol requeue 17_1")
