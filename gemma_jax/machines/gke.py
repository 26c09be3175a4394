"""Jobs on GKE over xpk: several slices in one job, queues and priorities.

A job is a workload of xpk: an image with the code of the snapshot on a public Python, one container
a machine. What it keeps lies on a storage of the cluster (`xpk storage`) that every container sees
at the same path.
"""

import dataclasses
import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from gemma_jax.errors import PREEMPTED_CODE, UserError
from gemma_jax.machines.accelerators import check_accelerator
from gemma_jax.machines.job import Job, check_name, check_zone, names_of_points
from gemma_jax.machines.shell import Shell

_GRACE_S = 120  # to save after the notice
_SELECTOR = "jobset.sigs.k8s.io/jobset-name"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """What a job asks the cluster for. `image` is the base of its containers, with Python 3.12."""

    accelerator: str
    num_slices: int = 1
    priority: str = "medium"
    image: str = "python:3.12"
    max_restarts: int = 100

    def __post_init__(self) -> None:
        check_accelerator(self.accelerator)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cluster:
    """A cluster that xpk has made. `storage` is one of its storages, mounted at `mount`."""

    name: str
    zone: str
    project: str | None = None
    storage: str | None = None
    mount: str | None = None
    shell: Shell = dataclasses.field(default_factory=Shell)

    def __post_init__(self) -> None:
        check_zone(self.zone)
        if (self.storage is None) != (self.mount is None):
            raise UserError(
                "--storage (its name in xpk) and --mount (the path where it is mounted) go "
                "together; give both."
            )
        if self.mount is not None and not PurePosixPath(self.mount).is_absolute():
            raise UserError(
                f"--mount {self.mount} must be a path from the root of the containers, such as "
                "/shared."
            )

    def run(self, name: str, job: Job, workload: Workload) -> None:
        """Hands a job in. The cluster starts it again after a preemption, without anyone here."""
        check_name(name, "workload")
        if self.mount is None:
            raise UserError(
                "containers lose their disks when they end; give --storage and --mount, a storage "
                "of the cluster that all of them see."
            )
        with tempfile.TemporaryDirectory() as code:
            if not self.shell.dry_run:
                job.snapshot.unpack(Path(code))
            argv = [
                *("xpk", "workload", "create", f"--workload={name}", *self._place()),
                *(f"--tpu-type={workload.accelerator}", f"--num-slices={workload.num_slices}"),
                *(f"--storage={self.storage}", f"--priority={workload.priority}"),
                *(f"--max-restarts={workload.max_restarts}",),
                f"--restart-on-exit-codes={PREEMPTED_CODE}",
                f"--termination-grace-period-seconds={_GRACE_S}",
                *(f"--base-docker-image={workload.image}", f"--script-dir={code}"),
                f"--command={self._command(job)}",
            ]
            if self.shell.show(argv):
                raise UserError(f"xpk did not take {name}; its message is above.")

    def sweep(self, name: str, job: Job, points: Sequence[str], workload: Workload) -> list[str]:
        """Hands in a job for each point; returns their names."""
        names = names_of_points(name, points)
        for point, one in names.items():
            self.run(one, job.of_point(point), workload)
        return list(names.values())

    def status(self, name: str) -> int:
        """Prints the cluster's workloads whose names begin with this one."""
        argv = ["xpk", "workload", "list", *self._place(), f"--filter-by-job={name}"]
        return self.shell.show(argv)

    def stop(self, name: str) -> int:
        """Ends a workload; what it has kept stays."""
        argv = ["xpk", "workload", "delete", f"--workload={name}", *self._place(), "--force"]
        return self.shell.show(argv)

    def logs(self, name: str, *, follow: bool = False) -> int:
        """Prints the logs of a workload's containers, each line with its container's name."""
        argv = ["kubectl", "logs", f"--selector={_SELECTOR}={name}", "--prefix", "--tail=100"]
        return self.shell.show([*argv, "--max-log-requests=64", *(["--follow"] if follow else [])])

    def _place(self) -> list[str]:
        project = [] if self.project is None else [f"--project={self.project}"]
        return [f"--cluster={self.name}", f"--zone={self.zone}", *project]

    def _command(self, job: Job) -> str:
        """What a container runs, in the folder of the code. xpk sends its shell a notice of
        preemption, so the program takes that shell's place."""
        words = ["set -e"]
        for kept in job.keep:
            there = shlex.quote(f"{self.mount}/{kept}")
            words.append(f"mkdir -p {there} {shlex.quote(str(PurePosixPath(kept).parent))}")
            words.append(f"ln -sfn {there} {shlex.quote(kept)}")
        return "; ".join([*words, f"export GEMMA_JAX_EXTRA=tpu; exec ./launch.sh {job.words}"])
