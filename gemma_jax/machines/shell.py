"""Programs of others: run, or printed instead, or missing with a sentence that says what to do."""

import dataclasses
import shlex
import shutil
import subprocess
from collections.abc import Sequence

from gemma_jax.errors import UserError

_INSTALL = {
    "gcloud": "install the Google Cloud CLI (cloud.google.com/sdk/docs/install), run `gcloud init`",
    "xpk": "install it (uv tool install xpk, or pip install xpk) with kubectl and gcloud",
    "kubectl": "install it (gcloud components install kubectl)",
    "sbatch": "log in to a node of the cluster that submits jobs",
    "git": "install it",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """What a program has printed, and its exit code. What is no UTF-8 (the log of a worker may be
    cut within a letter) can be encoded again with surrogateescape."""

    code: int
    out: str
    err: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shell:
    """Runs programs; with `dry_run` it prints each command line on stdout and runs none."""

    dry_run: bool = False

    def ask(self, argv: Sequence[str]) -> Answer:
        """Runs a program to its end, whatever its exit code."""
        if self.dry_run:
            print(shlex.join(argv))
            return Answer(code=0, out="", err="")
        require(argv[0])
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True)
        out, err = (text.decode(errors="surrogateescape") for text in (done.stdout, done.stderr))
        return Answer(code=done.returncode, out=out, err=err)

    def do(self, argv: Sequence[str], what: str) -> str:
        """Runs a program that has to succeed and returns its stdout; `what` says what it is for."""
        answer = self.ask(argv)
        if answer.code:
            raise UserError(f"{what} failed: {reason(answer)}")
        return answer.out

    def show(self, argv: Sequence[str]) -> int:
        """Runs a program that prints for the user itself; returns its exit code."""
        if self.dry_run:
            return self.ask(argv).code
        require(argv[0])
        return subprocess.run(argv, stdin=subprocess.DEVNULL).returncode

    def note(self, text: str) -> None:
        """A comment among the commands of a dry run."""
        if self.dry_run:
            print(f"# {text}")


def require(program: str) -> None:
    if shutil.which(program) is None:
        how = _INSTALL.get(program, "install it")
        raise UserError(f"{program} is not on this machine; {how} and run the same command again.")


def reason(answer: Answer) -> str:
    """One line of what a program has said, the one with its error where it is marked."""
    lines = [line.strip() for line in answer.err.splitlines() if line.strip()]
    marked = [line for line in lines if "ERROR" in line or "error:" in line]
    said = (marked or lines[-1:] or [f"exit code {answer.code}"])[0]
    return said if said.endswith((".", "!")) else f"{said}."
