"""What is handed to machines: a command of this package, the code that runs it, and a bucket."""

import dataclasses
import hashlib
import re
import shlex
from collections.abc import Sequence
from pathlib import PurePosixPath

from gemma_jax.errors import UserError
from gemma_jax.machines.snapshot import Snapshot


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """`command` is what follows `python -m gemma_jax`, run by all processes of a job together.

    `keep` are the folders that outlive the machines, named from where the command is started: in
    `bucket` (gs://...) on Cloud TPU, on the shared disk elsewhere.
    """

    command: tuple[str, ...]
    snapshot: Snapshot
    bucket: str | None = None
    keep: tuple[str, ...] = ("runs",)

    def __post_init__(self) -> None:
        if self.bucket is not None:
            object.__setattr__(self, "bucket", check_bucket(self.bucket))
        for folder in self.keep:
            path = PurePosixPath(folder)
            if path.is_absolute() or ".." in path.parts or not path.parts:
                raise UserError(
                    f"--keep {folder} must be a folder below the one you stand in, such as runs."
                )
        self.snapshot.check_files(self.command)

    @property
    def words(self) -> str:
        """The command as a shell reads it."""
        return shlex.join(self.command)

    @property
    def id(self) -> str:
        """The same for the same command, code and places."""
        parts = (*self.command, "", self.snapshot.tree, self.bucket or "-", *self.keep)
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]

    @property
    def kept_in(self) -> str:
        """Where its results are, for people."""
        return ", ".join(f"{self.bucket}/{folder}" for folder in self.keep if self.bucket) or (
            "the disk of the slice's first worker"
        )

    def of_point(self, point: str) -> "Job":
        """The part of a sweep that is one of its points."""
        return dataclasses.replace(self, command=(*self.command, "--only", point))


def check_bucket(text: str) -> str:
    """`gs://NAME` or `gs://NAME/FOLDER`, without a slash at its end."""
    if not re.fullmatch(r"gs://[a-z0-9][a-z0-9._-]+(/[^/\s]+)*/?", text):
        raise UserError(
            f"--bucket {text} must be a place in Cloud Storage, such as gs://mine/jobs: the name "
            "of a bucket has small letters, digits, dots, dashes and underscores."
        )
    return text.rstrip("/")


def check_name(name: str, kind: str) -> str:
    """Names of machines and jobs are parts of host names."""
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", name):
        raise UserError(
            f"'{name}' cannot name a {kind}; use up to 40 small letters, digits and dashes that "
            "begin with a letter."
        )
    return name


def check_zone(zone: str) -> str:
    if not re.fullmatch(r"[a-z][a-z0-9-]*", zone):
        raise UserError(f"--zone '{zone}' cannot name a zone; write it as us-west4-a.")
    return zone


def names_of_points(name: str, points: Sequence[str]) -> dict[str, str]:
    """A job's name for each point; points have freer names than jobs."""
    return {point: f"{name}-{place}" for place, point in enumerate(points)}
