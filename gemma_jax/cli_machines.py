"""The verbs that hand a command to other machines."""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from gemma_jax import report
from gemma_jax.arguments import parse
from gemma_jax.errors import UserError

_MACHINES = ("tpu", "gke", "slurm")


def tpu(arguments: argparse.Namespace) -> None:
    from gemma_jax.machines import tpu as machines
    from gemma_jax.machines.shell import Shell
    from gemma_jax.machines.slices import Slice

    place = Slice(
        name=arguments.name,
        zone=arguments.zone,
        project=arguments.project,
        accelerator=getattr(arguments, "type", None),
        runtime=getattr(arguments, "runtime_version", None),
        spot=getattr(arguments, "spot", False),
        poll_s=getattr(arguments, "poll_s", 20.0),
        shell=Shell(dry_run=arguments.dry_run),
    )
    if arguments.action == "create":
        place.create()
        _tell(arguments, {"name": place.name}, f"`tpu status {place.name}` says when it is there")
    elif arguments.action == "run":
        job = _job(arguments, arguments.command)
        restarts = machines.run(place, job, arguments.max_restarts)
        value = {"name": place.name, "restarts": restarts}
        _tell(arguments, value, _done(job, [place.name], arguments.zone))
    elif arguments.action == "sweep":
        job, points = _sweep(arguments)
        names = [f"{place.name}-{number}" for number in range(min(arguments.slices, len(points)))]
        slices = [dataclasses.replace(place, name=name) for name in names]
        failed = machines.sweep(slices, job, points, arguments.max_restarts)
        if failed:
            raise UserError(f"these points failed, see above: {', '.join(failed)}.")
        _tell(arguments, {"points": points}, _done(job, names, arguments.zone))
    elif arguments.action == "status":
        state = place.state()
        workers = place.ask_workers()[0] if state in ("ACTIVE", "UNKNOWN") else []
        value = {"state": state, "workers": [dataclasses.asdict(worker) for worker in workers]}
        lines = [f"{place.name}: {state or 'there is no such slice'}"]
        lines += [
            f"worker {one.index}: {one.state}"
            + (f" with exit code {one.code}" if one.state == "ended" else "")
            for one in workers
        ]
        _tell(arguments, value, "\n".join(lines))
    elif arguments.action == "logs":
        print(place.log(arguments.worker), end="")
    else:
        {"stop": place.stop, "delete": place.delete}[arguments.action]()


def gke(arguments: argparse.Namespace) -> None:
    from gemma_jax.machines.gke import Cluster, Workload
    from gemma_jax.machines.shell import Shell

    hands_in = arguments.action in ("run", "sweep")
    cluster = Cluster(
        name=arguments.cluster,
        zone=arguments.zone,
        project=arguments.project,
        storage=arguments.storage if hands_in else None,
        mount=arguments.mount if hands_in else None,
        shell=Shell(dry_run=arguments.dry_run),
    )
    if hands_in:
        workload = Workload(
            accelerator=arguments.type,
            num_slices=arguments.num_slices,
            priority=arguments.priority,
            image=arguments.image,
            max_restarts=arguments.max_restarts,
        )
        if arguments.action == "run":
            cluster.run(arguments.name, _job(arguments, arguments.command), workload)
        else:
            job, points = _sweep(arguments)
            cluster.sweep(arguments.name, job, points, workload)
        return
    if arguments.action == "logs":
        code = cluster.logs(arguments.name, follow=arguments.follow)
    else:
        code = {"status": cluster.status, "stop": cluster.stop}[arguments.action](arguments.name)
    _passed_on(code)


def slurm(arguments: argparse.Namespace) -> None:
    from gemma_jax.machines import slurm as machines
    from gemma_jax.machines.shell import Shell

    shell, name = Shell(dry_run=arguments.dry_run), arguments.name
    if arguments.action in ("run", "sweep"):
        request = machines.Request(
            nodes=arguments.nodes,
            gpus=arguments.gpus,
            cpus=arguments.cpus,
            partition=arguments.partition,
            account=arguments.account,
            time=arguments.time,
            options=tuple(arguments.sbatch),
            max_restarts=arguments.max_restarts,
        )
        if arguments.action == "run":
            number = machines.run(name, _job(arguments, arguments.command), request, shell)
        else:
            job, points = _sweep(arguments)
            number = machines.sweep(name, job, points, request, shell, arguments.at_once)
        if not shell.dry_run:
            print(f"job {number}; its logs are in {machines.JOBS / name / 'logs'}")
    elif arguments.action == "logs":
        print(machines.logs(name, arguments.worker), end="")
    else:
        _passed_on(
            {"status": machines.status, "stop": machines.stop}[arguments.action](name, shell)
        )


def _job(arguments: argparse.Namespace, command: list[str]) -> Any:
    """The command, checked here as it will be read there, and the code of this folder."""
    from gemma_jax.machines import snapshot
    from gemma_jax.machines.job import Job

    read = parse(command)
    if read.verb in _MACHINES:
        raise UserError(f"'{read.verb}' hands a command on; give one that does the work.")
    if getattr(read, "distributed", True) is False:
        command = [*command, "--distributed"]
    more = {} if arguments.keep is None else {"keep": tuple(arguments.keep)}
    return Job(
        command=tuple(command),
        snapshot=snapshot.take(Path.cwd()),
        bucket=getattr(arguments, "bucket", None),
        **more,
    )


def _sweep(arguments: argparse.Namespace) -> tuple[Any, list[str]]:
    """The sweep as a command, and its points."""
    command = ["sweep", *arguments.command]
    return _job(arguments, command), _points(command)


def _points(command: list[str]) -> list[str]:
    """The points of a sweep; a process of its own reads the file, which takes jax."""
    listed = subprocess.run(
        [sys.executable, "-m", "gemma_jax", *command, "--list", "--json"],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        text=True,
    )
    if listed.returncode:
        sys.exit(listed.returncode)  # it has said why
    return json.loads(listed.stdout)


def _done(job: Any, names: list[str], zone: str) -> str:
    lines = [f"done; see {job.kept_in}. Slices cost until they are deleted:"]
    return "\n".join([*lines, *(f"  tpu delete {name} --zone {zone}" for name in names)])


def _tell(arguments: argparse.Namespace, value: Any, text: str) -> None:
    if not arguments.dry_run:
        report.emit(arguments, value, text)


def _passed_on(code: int) -> None:
    """Ends as the program has ended that was called; it has said why."""
    if code:
        sys.exit(code)
