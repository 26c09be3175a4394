"""A slice of Cloud TPUs over gcloud: asked for, set up, and told what to do.

A slice is a queued resource with one node of the same name. On its workers `worker.sh` does what
has to be done there; what that prints is all that is known of them here.
"""

import dataclasses
import json
import re
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from gemma_jax.errors import UserError
from gemma_jax.machines.accelerators import check_accelerator, count_workers, runtime_version
from gemma_jax.machines.job import Job, check_name, check_zone
from gemma_jax.machines.shell import Answer, Shell, reason

_GONE = ("SUSPENDING", "SUSPENDED")  # of a queued resource
_NODE_GONE = ("PREEMPTED", "TERMINATED", "STOPPED")
_FOLDER = "gemma_jax_job"  # in the home of each worker
_SCRIPT = "code/gemma_jax/machines/worker.sh"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Worker:
    """What a worker says of the last command: idle, running, lost, or ended (when, which code)."""

    index: int
    state: str
    code: int
    time: int
    job: str


@dataclasses.dataclass(kw_only=True)
class Slice:
    """A slice by name; `accelerator` (v5litepod-16) is needed where it may have to be made."""

    name: str
    zone: str
    project: str | None = None
    accelerator: str | None = None
    runtime: str | None = None
    spot: bool = False
    poll_s: float = 20.0
    shell: Shell = dataclasses.field(default_factory=Shell)
    _seen: int = dataclasses.field(default=0, init=False)  # bytes of the log that were printed

    def __post_init__(self) -> None:
        check_name(self.name, "slice")
        check_zone(self.zone)
        if self.accelerator is not None:
            check_accelerator(self.accelerator)

    # The slice itself.

    def create(self) -> None:
        """Asks for the slice; it is there once its state is ACTIVE."""
        if self.accelerator is None:
            raise UserError(
                f"there is no slice {self.name} in {self.zone}; say what to ask for, such as "
                "--type v5litepod-16."
            )
        asked = [
            f"--node-id={self.name}",
            f"--accelerator-type={self.accelerator}",
            f"--runtime-version={self.runtime or runtime_version(self.accelerator)}",
            *(["--spot"] if self.spot else []),
        ]
        self.shell.do(self._queued("create", *asked), f"asking for {self.accelerator}")
        self.say(f"asked for {self.accelerator} in {self.zone}{' (spot)' * self.spot}")

    def delete(self) -> None:
        """Gives the slice back, with all that is on its disks."""
        self.shell.do(self._queued("delete", "--force"), f"deleting {self.name}")

    def describe(self) -> dict[str, Any] | None:
        """What Cloud TPU says of the queued resource; None where there is none."""
        answer = self.shell.ask(self._queued("describe", "--format=json"))
        if answer.code and "NOT_FOUND" in answer.err:
            return None
        if answer.code:
            raise UserError(f"asking for the state of {self.name} failed: {reason(answer)}")
        return json.loads(answer.out) if answer.out.strip() else {}

    def state(self) -> str | None:
        """WAITING_FOR_RESOURCES, ACTIVE, SUSPENDED and so on; PREEMPTED where the machines have
        gone before Cloud TPU has noted it; None where there is no such slice."""
        described = self.describe()
        if described is None:
            return None
        self._recall(described)
        state = str(described.get("state", {}).get("state", "UNKNOWN"))
        if state in _GONE:
            return "PREEMPTED"
        if state == "FAILED":
            error = described["state"].get("failedData", {}).get("error", {})
            raise UserError(
                f"Cloud TPU cannot give {self.name} "
                f"({error.get('message', 'it names no reason').rstrip('.')}); delete it and ask "
                "in another zone or for another type."
            )
        if state == "ACTIVE":
            node = self.shell.ask(self._node("describe", self.name, "--format=value(state)"))
            if node.out.strip() in _NODE_GONE or (node.code and "NOT_FOUND" in node.err):
                return "PREEMPTED"
        return state

    def wait(self) -> None:
        """Returns when the slice is there; asks for it where it is not, or has been taken away."""
        told = None
        while True:
            state = self.state()
            if state == "ACTIVE":
                return
            if state == "PREEMPTED":
                self.say("was taken away; asking for it again")
                self.delete()
            if state in (None, "PREEMPTED"):
                self.create()
            elif state != told:
                self.say(f"{state}; waiting for it to become ACTIVE")
                told = state
            time.sleep(self.poll_s)

    def count(self) -> int:
        """Workers that it has."""
        return count_workers(self.accelerator) if self.accelerator else 1

    # The command on it.

    def set_up(self, job: Job) -> None:
        """Brings code, packages and what the bucket has to every worker."""
        with tempfile.TemporaryDirectory() as aside:
            path = Path(aside) / job.snapshot.archive_name
            if not self.shell.dry_run:
                job.snapshot.write(path)
            if job.bucket is None:
                there = f"{_FOLDER}.tar.gz"
                copy = self._node("scp", str(path), f"{self.name}:{there}", "--worker=all")
                fetch = f"mv ../{there} code.tar.gz"
            else:
                place = f"{job.bucket}/.code/{path.name}"
                copy = ["gcloud", "storage", "cp", str(path), place, "--quiet"]
                fetch = f"gcloud storage cp {place} code.tar.gz --quiet"
            self.shell.do(copy, f"copying the code to {job.bucket or self.name}")
        settings = shlex.join([self.name, job.bucket or "-", *job.keep])
        unpack = (
            "find code -mindepth 1 -maxdepth 1 ! -name .venv -exec rm -rf {} + "
            "&& tar -xzf code.tar.gz -C code"
        )
        self.say("setting up its workers")
        self._on_all(
            f"mkdir -p {_FOLDER}/code && cd {_FOLDER} && {fetch} && {unpack} "
            f"&& bash {_SCRIPT} setup {settings}",
            "setting up the workers",
        )

    def start(self, job: Job) -> None:
        """Starts the job's command on every worker and does not wait for it."""
        self.say(f"starting {job.words}")
        self._seen = 0
        self._on_all(f"{self._script('start')} {job.id} {job.words}", "starting the command")

    def ask_workers(self) -> tuple[list[Worker], Answer]:
        """Those that answer, by index (none before the first setup), and gcloud's own answer."""
        answer = self.shell.ask(self._ssh(self._script("status"), "all"))
        found = re.findall(r"gemma-jax-worker (\d+) (\w+) (\d+) (\d+) (\S+)", answer.out)
        workers = [
            Worker(index=int(index), state=state, code=int(code), time=int(when), job=job)
            for index, state, code, when, job in found
        ]
        return sorted(workers, key=lambda worker: worker.index), answer

    def stop(self) -> None:
        """Stops the command on all workers, as Ctrl-C does, and waits until it has ended."""
        self._on_all(self._script("stop"), "stopping the command")

    def log(self, worker: int) -> str:
        """What the command has printed on one worker."""
        command = self._ssh(f"{self._script('log')} 0", str(worker))
        return self.shell.do(command, f"reading the log of worker {worker}")

    def print_log(self) -> None:
        """Prints what the first worker's log has that was not printed before."""
        answer = self.shell.ask(self._ssh(f"{self._script('log')} {self._seen}", "0"))
        if not answer.code:
            self._seen += len(answer.out.encode(errors="surrogateescape"))
            print(answer.out, end="", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        if not self.shell.dry_run:
            print(f"{self.name}: {text}", file=sys.stderr, flush=True)

    # The commands of gcloud.

    def _recall(self, described: dict[str, Any]) -> None:
        """Takes what to ask for again from the slice that is there."""
        specs = described.get("tpu", {}).get("nodeSpec") or [{}]
        node = specs[0].get("node", {})
        there = node.get("acceleratorType")
        if there and self.accelerator and there != self.accelerator:
            raise UserError(
                f"{self.name} is a {there}, and --type {self.accelerator} was asked for; delete it "
                "first, or take another name."
            )
        self.accelerator = self.accelerator or there
        self.runtime = self.runtime or node.get("runtimeVersion")
        self.spot = self.spot or "spot" in described

    def _place(self) -> list[str]:
        project = [] if self.project is None else [f"--project={self.project}"]
        return [f"--zone={self.zone}", *project, "--quiet"]

    def _queued(self, verb: str, *more: str) -> list[str]:
        base = ["gcloud", "compute", "tpus", "queued-resources", verb, self.name]
        return [*base, *self._place(), *more]

    def _node(self, verb: str, *more: str) -> list[str]:
        keys = ["--strict-host-key-checking=no"] * (verb != "describe")  # a new slice has new ones
        return ["gcloud", "compute", "tpus", "tpu-vm", verb, *more, *self._place(), *keys]

    def _ssh(self, command: str, worker: str) -> list[str]:
        return self._node("ssh", self.name, f"--worker={worker}", f"--command={command}")

    def _script(self, verb: str) -> str:
        return f"bash {_FOLDER}/{_SCRIPT} {verb}"

    def _on_all(self, command: str, what: str) -> None:
        self.shell.do(self._ssh(command, "all"), f"{what} of {self.name}")
