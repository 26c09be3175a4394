"""Paths in buckets (`gs://BUCKET/...`): finished data are read there, and checkpoints kept there.

`place` is the door: a path on disk, or one of `etils.epath` that behaves like it. What differs:

- An object appears whole or not at all, so a single file needs no writing aside. A folder is there
  when its last file is: `manifest.json` of data, Orbax's `commit_success.txt` of a checkpoint.
- Nothing can be renamed or appended to in one go, and there are no locks. So run folders, their
  logs and everything that is built stay on disk. Whose a checkpoint is it says itself.
- ArrayRecord reads files: `local` copies an object to the user's cache, at its first use.
"""

import hashlib
import importlib.util
import os
import re
import shutil
from pathlib import Path
from typing import Any

from gemma_jax.errors import UserError
from gemma_jax.files import PARTIAL_SUFFIX, cache, disk_errors, patiently

_SCHEME = "gs://"


def is_remote(path: str | Path) -> bool:
    return str(path).startswith(_SCHEME)


def place(path: str | Path) -> Path:
    """The path, in a bucket where it names one."""
    if not is_remote(path):
        if re.match(r"[A-Za-z][A-Za-z0-9+]+:/", str(path)):
            raise UserError(f"{path} is no path here; of buckets gs://BUCKET/... are known.")
        return Path(path)
    if not str(path).removeprefix(_SCHEME).strip("/"):
        raise UserError(f"{path} names no bucket; write gs://BUCKET/...")
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(
            f"{path} is in a bucket, which needs the package gcsfs: start with "
            "`GEMMA_JAX_EXTRA=cpu,gcs ./launch.sh ...` (cuda or tpu for cpu where it is one)."
        )
    from etils import epath

    remote: Any = epath.Path(path)
    return remote


def absolute(path: Path) -> Path:
    return path if is_remote(path) else path.absolute()


def size(path: Path) -> int:
    """In bytes."""
    stat: Any = path.stat()
    return stat.length if is_remote(path) else stat.st_size


def local(path: Path) -> Path:
    """A file that has the content of `path`: itself, or a copy of the object."""
    if not is_remote(path):
        return path
    stat: Any = path.stat()
    version = hashlib.sha256(f"{path} {stat.length} {stat.mtime}".encode()).hexdigest()
    copy = cache() / "objects" / version[:32]
    if copy.exists():
        return copy

    def fetch() -> None:
        copy.parent.mkdir(parents=True, exist_ok=True)
        aside = copy.with_name(f"{copy.name}.{os.getpid()}{PARTIAL_SUFFIX}")
        with path.open("rb") as source, aside.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 24)
        if aside.stat().st_size != stat.length:
            raise ConnectionResetError(f"{path} came as {aside.stat().st_size} bytes")
        aside.replace(copy)

    with disk_errors(copy, full_only=True):
        patiently(fetch, path, doing="read")
    return copy
