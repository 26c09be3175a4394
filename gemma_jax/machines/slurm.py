"""Jobs on a SLURM cluster: one process a node, all GPUs of the node for it; arrays for sweeps.

Nodes see the same disk. A job gets a copy of the code in `runs/.jobs/NAME`, so that what waits in
the queue is what was handed in, and its script, which SLURM keeps its own copy of.
"""

import dataclasses
import getpass
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

from gemma_jax.errors import PREEMPTED_CODE, UserError
from gemma_jax.files import write_text
from gemma_jax.machines.job import Job, check_name
from gemma_jax.machines.shell import Shell

JOBS = Path("runs/.jobs")
_NOTICE_S = 120  # before the end of its time, a job is asked to save

_SCRIPT = r"""#!/bin/bash
code={code} logs={logs}
cd "$code" || exit
export GEMMA_JAX_EXTRA=${{GEMMA_JAX_EXTRA:-cuda}} PYTHONPATH=$code
points=({points})
task=${{SLURM_ARRAY_TASK_ID:-}}
self=$SLURM_JOB_ID
if [[ $task ]]; then self=${{SLURM_ARRAY_JOB_ID}}_$task; fi
failed=$logs/$self.failed
rm -f "$failed"

# What each node runs: it notes how it has failed, also when it was sent a signal. 143 is SIGTERM
# before the program listened to it.
process='trap : TERM INT; "$@"; code=$?
  if ((code == 143)); then code={preempted}; fi
  if ((code)); then echo "$(date +%s) $SLURM_PROCID $code" >>"$0"; fi
  exit $code'

# A process that fails ends the others a minute later; those that were asked to stop end together.
# SIGTERM reaches this script alone, and srun hands it on.
srun --cpus-per-task={cpus} --kill-on-bad-exit=0 --wait=60 \
  --output="$logs/$self-%t.log" --open-mode=append \
  bash -c "$process" "$failed" {launch} {words}{only} &
step=$!
trap 'kill -TERM "$step"' TERM
while :; do # a signal ends wait early
  wait "$step"
  exit_code=$?
  kill -0 "$step" 2>/dev/null || break
done

if ((exit_code == {preempted} && ${{SLURM_RESTART_COUNT:-0}} < {max_restarts})); then
  echo "job $self was stopped and is saved; it goes on when its turn comes again"
  exec scontrol requeue "$self"
fi
if ((exit_code)) && [[ -s $failed ]]; then
  read -r _ number its < <(sort -n "$failed")
  echo "process $number of job $self ended with exit code $its; the end of its log:"
  tail -n 50 "$logs/$self-$number.log"
fi
exit "$exit_code"
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What a job asks SLURM for; None leaves it to the cluster. `gpus` and `cpus` are those of a
    node, `time` is written as for sbatch, and `options` are more of its options."""

    nodes: int = 1
    gpus: int = 8
    cpus: int = 16
    partition: str | None = None
    account: str | None = None
    time: str | None = None
    options: tuple[str, ...] = ()
    max_restarts: int = 100


def run(name: str, job: Job, request: Request, shell: Shell) -> str:
    """Hands a job in and returns SLURM's number of it."""
    return _submit(name, job, request, shell, ())


def sweep(
    name: str, job: Job, points: Sequence[str], request: Request, shell: Shell, at_once: int | None
) -> str:
    """Hands in an array with a job for each point, `at_once` of them at a time at most."""
    limit = "" if at_once is None else f"%{at_once}"
    return _submit(name, job, request, shell, points, f"--array=0-{len(points) - 1}{limit}")


def status(name: str, shell: Shell) -> int:
    """Prints what waits and runs under a name."""
    form = "--format=%.18i %.9P %.20j %.8T %.10M %.6D %R"
    return shell.show(["squeue", f"--user={getpass.getuser()}", f"--name={name}", form])


def stop(name: str, shell: Shell) -> int:
    """Ends the jobs of a name as Ctrl-C does, after saving; those that wait are taken back."""
    shell.show(["scancel", f"--user={getpass.getuser()}", f"--name={name}", "--state=PENDING"])
    return shell.show(["scancel", f"--user={getpass.getuser()}", f"--name={name}", "--signal=INT"])


def logs(name: str, worker: int) -> str:
    """The newest log of one process of a job."""
    check_name(name, "job")
    folder = JOBS / name / "logs"
    found = sorted(folder.glob(f"*-{worker}.log"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError(f"{folder} has no log of process {worker}; the job may not have begun.")
    return found[-1].read_text(errors="replace")


def _submit(
    name: str, job: Job, request: Request, shell: Shell, points: Sequence[str], *more: str
) -> str:
    check_name(name, "job")
    folder = job.snapshot.root / JOBS / name
    code, logs = folder / job.snapshot.tree[:16], folder / "logs"
    path = folder / "job.sh"
    if not shell.dry_run:
        _lay_out(job, code, logs)
        write_text(path, script(job, request, code, logs, points))
    wanted = {"partition": request.partition, "account": request.account, "time": request.time}
    argv = [
        *("sbatch", "--parsable", f"--job-name={name}"),
        *(f"--nodes={request.nodes}", "--ntasks-per-node=1"),
        *(f"--gpus-per-node={request.gpus}", f"--cpus-per-task={request.cpus}"),
        *("--requeue", f"--signal=B:TERM@{_NOTICE_S}", "--open-mode=append"),
        f"--output={logs}/%{'A_%a' if points else 'j'}.out",
        *(f"--{option}={value}" for option, value in wanted.items() if value is not None),
        *more,
        *request.options,
        str(path),
    ]
    return shell.do(argv, f"handing {name} in").strip()


def _lay_out(job: Job, code: Path, logs: Path) -> None:
    """The code of the job, with links to the folders that it keeps."""
    logs.mkdir(parents=True, exist_ok=True)
    if not code.exists():
        aside = code.with_name(code.name + ".partial")
        shutil.rmtree(aside, ignore_errors=True)
        job.snapshot.unpack(aside)
        aside.rename(code)
    for kept in job.keep:
        there, here = job.snapshot.root / kept, code / kept
        there.mkdir(parents=True, exist_ok=True)
        here.parent.mkdir(parents=True, exist_ok=True)
        if not here.exists():
            here.symlink_to(there)


def script(job: Job, request: Request, code: Path, logs: Path, points: Sequence[str]) -> str:
    """The batch script: processes on all nodes, again after a preemption, a failure explained."""
    return _SCRIPT.format(
        words=job.words,
        code=shlex.quote(str(code)),
        logs=shlex.quote(str(logs)),
        cpus=request.cpus,
        launch=shlex.quote(str(job.snapshot.root / "launch.sh")),
        points=shlex.join(points),
        only=' --only "${points[task]}"' if points else "",
        preempted=PREEMPTED_CODE,
        max_restarts=request.max_restarts,
    )
