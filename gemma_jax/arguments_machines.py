"""What `tpu`, `gke` and `slurm` take; they hand a command of this package to other machines."""

import argparse
from collections.abc import Callable
from typing import Any

from gemma_jax.options import positive

type Add = Callable[..., argparse.ArgumentParser]

_COMMAND = "what to run there, after two dashes: -- train mine.py --set mesh.fsdp=4"
_SWEEP = "the sweep, after two dashes: -- mine.py --seeds 0,1,2"


def add_machines(add: Add) -> None:
    """Adds the three verbs, each with its actions."""
    _tpu(_actions(add, "tpu", "A slice of Cloud TPUs, over gcloud (docs/cloud_tpu.md)."))
    _gke(_actions(add, "gke", "TPUs of a GKE cluster, over xpk: slices and queues."))
    _slurm(_actions(add, "slurm", "GPU nodes of a SLURM cluster, over sbatch."))


def _actions(add: Add, verb: str, help: str) -> Callable[..., argparse.ArgumentParser]:
    actions = add(verb, help=help, description=help).add_subparsers(
        dest="action", metavar="ACTION", required=True
    )

    def action(name: str, help: str, what: str = "slice") -> argparse.ArgumentParser:
        one = actions.add_parser(name, help=help, description=help)
        one.add_argument("name", help=f"of the {what}")
        one.add_argument("--dry-run", action="store_true", help="print the commands, run none")
        return one

    return action


def _tpu(action: Callable[..., argparse.ArgumentParser]) -> None:
    for name, help in (
        ("create", "Ask for a slice."),
        ("run", "Run a command on a slice: made, set up, watched, started again if preempted."),
        ("sweep", "Run the points of a sweep on slices NAME-0, NAME-1, ..."),
        ("logs", "Print what the command has printed on one worker."),
        ("status", "Print the state of a slice and of the command on its workers."),
        ("stop", "Stop the command, after it has saved; the slice stays."),
        ("delete", "Give the slice back, with its disks."),
    ):
        one = action(name, help)
        one.add_argument("--zone", required=True, help="such as us-west4-a")
        one.add_argument("--project", help="gcloud's own by default")
        if name in ("create", "run", "sweep"):
            one.add_argument("--type", help="such as v5litepod-16, v6e-8, v5p-64")
            one.add_argument("--spot", action="store_true", help="cheaper, and may be taken away")
            one.add_argument("--runtime-version", help="image of its machines; the type's own")
            one.add_argument("--json", action="store_true", help="print one JSON value on stdout")
        if name in ("run", "sweep"):
            one.add_argument("--bucket", metavar="gs://PLACE", help="where code and runs are kept")
            _job_options(one, name)
            one.add_argument(
                "--poll-s", type=float, default=20.0, help="seconds from one look to the next"
            )
        if name == "sweep":
            one.add_argument("--slices", type=positive, default=1, help="at a time")
        if name == "status":
            one.add_argument("--json", action="store_true", help="print one JSON value on stdout")
        if name == "logs":
            one.add_argument("--worker", type=int, default=0, help="from 0 on")


def _gke(action: Callable[..., argparse.ArgumentParser]) -> None:
    for name, help in (
        ("run", "Hand a command in; the cluster starts it again after a preemption."),
        ("sweep", "Hand in a job for each point of a sweep: NAME-0, NAME-1, ..."),
        ("logs", "Print the logs of a job."),
        ("status", "Print the jobs whose names contain NAME."),
        ("stop", "End a job."),
    ):
        one = action(name, help, "job")
        one.add_argument("--cluster", required=True, help="one that xpk has made")
        one.add_argument("--zone", required=True, help="of the cluster")
        one.add_argument("--project", help="gcloud's own by default")
        if name in ("run", "sweep"):
            one.add_argument("--type", required=True, help="of a slice, such as v5litepod-16")
            one.add_argument("--num-slices", type=positive, default=1, help="that work together")
            one.add_argument("--storage", help="a storage of the cluster, by its name in xpk")
            one.add_argument("--mount", help="the path where it is mounted")
            one.add_argument(
                "--priority",
                default="medium",
                choices=("very-low", "low", "medium", "high", "very-high"),
                help="in the queue",
            )
            one.add_argument("--image", default="python:3.12", help="base of the containers")
            _job_options(one, name)
        if name == "logs":
            one.add_argument("--follow", action="store_true", help="go on as they grow")


def _slurm(action: Callable[..., argparse.ArgumentParser]) -> None:
    for name, help in (
        ("run", "Hand a command in: one process a node, again after a preemption."),
        ("sweep", "Hand in an array with a job for each point of a sweep."),
        ("logs", "Print the newest log of one process."),
        ("status", "Print what waits and runs under a name."),
        ("stop", "Stop the jobs of a name, after they have saved."),
    ):
        one = action(name, help, "job")
        if name in ("run", "sweep"):
            one.add_argument("--nodes", type=positive, default=1, help="of a job")
            one.add_argument("--gpus", type=positive, default=8, help="of a node")
            one.add_argument("--cpus", type=positive, default=16, help="of a node")
            one.add_argument("--partition", help="the cluster's own by default")
            one.add_argument("--account", help="that pays")
            one.add_argument("--time", help="limit, such as 12:00:00; then it is queued again")
            one.add_argument(
                "--sbatch",
                action="append",
                default=[],
                metavar="OPTION",
                help="another option of sbatch, as --sbatch=--mem=0; may be given several times",
            )
            _job_options(one, name)
        if name == "sweep":
            one.add_argument("--at-once", type=positive, help="jobs that run at a time, at most")
        if name == "logs":
            one.add_argument("--worker", type=int, default=0, help="process, from 0 on")


def _job_options(one: argparse.ArgumentParser, action: str) -> None:
    options: dict[str, Any] = {"action": "append", "metavar": "FOLDER"}
    one.add_argument(
        "--keep",
        **options,
        help="a folder that outlives the machines, instead of runs; may be given several times",
    )
    one.add_argument("--max-restarts", type=positive, default=100, help="after preemptions")
    one.add_argument("command", nargs="+", help=_SWEEP if action == "sweep" else _COMMAND)
