"""Files that are either whole or absent: write aside, flush to disk, then rename."""

import contextlib
import errno
import fcntl
import hashlib
import itertools
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from gemma_jax.errors import UserError

PARTIAL_SUFFIX = ".partial"


_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)  # only writing meets these


@contextlib.contextmanager
def disk_errors(path: str | Path, *, full_only: bool = False) -> Iterator[None]:
    """Turns a full, read-only or forbidden disk under `path` into one sentence; with `full_only`,
    around what also reads, a full one alone."""
    try:
        yield
    except OSError as error:
        if full_only and error.errno not in _FULL:
            raise
        causes = {
            errno.ENOSPC: "the disk is full; free some space and run the same command again",
            errno.EFBIG: "the file is over the size limit; raise it (ulimit -f) and run again",
            errno.EDQUOT: "the disk quota is used up; free some space and run the command again",
            errno.EROFS: "the file system is read-only; choose another folder",
            errno.EACCES: "permission is denied; choose a folder that you may write to",
            errno.EPERM: "permission is denied; choose a folder that you may write to",
            errno.ENOTDIR: "a part of that path is a file; choose another folder",
            errno.EEXIST: "a file of that name is in the way; choose another path",
            errno.EISDIR: "a folder of that name is in the way; choose another path",
            errno.ENOENT: "that folder cannot be made; choose another path",
            errno.ENAMETOOLONG: "that name is too long for the disk; choose a shorter one",
        }
        if error.errno not in causes:
            raise
        raise UserError(f"cannot write {path}: {causes[error.errno]}.") from error


def write_bytes(path: str | Path, content: bytes) -> None:
    """Writes `content` to `path` so that a reader sees the old or the new file, never a part."""
    path = Path(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(path.name + PARTIAL_SUFFIX)
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)


def write_text(path: str | Path, content: str) -> None:
    write_bytes(path, content.encode())


def write_json(path: str | Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: str | Path, what: str) -> dict[str, Any]:
    """Reads a JSON object; `what` names it in the error ("the manifest of a token set")."""
    try:
        value = json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; it should be {what}.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); it should be {what}.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); it should be {what}.") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is not {what}: it holds no JSON object; copy it again.")
    return value


@contextlib.contextmanager
def locked(
    folder: Path, refusal: Callable[[str], Exception] | None = None, *, name: str = ".lock"
) -> Iterator[None]:
    """Makes `folder` where it is missing and holds it for this process alone.

    Where process N holds it, raises `refusal(N)`, or waits if there is none. The system lets go of
    the lock when a process ends, however it ends. Afterwards the lock's file is gone, and so are
    the folders that were made for it, if nothing else has come into them. Locks of different names
    (of the file in the folder) do not know of each other.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    file = _lock(folder, name, refusal)
    try:
        yield
    finally:
        with file, contextlib.suppress(OSError):  # a folder that is not empty stays
            (folder / name).unlink()
            for path in made:
                path.rmdir()


def _lock(folder: Path, name: str, refusal: Callable[[str], Exception] | None) -> IO[str]:
    path = folder / name
    for attempt in itertools.count():
        with disk_errors(folder):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                file = path.open("a+")
            except (FileNotFoundError, FileExistsError):
                if attempt < 100:  # its last holder may just have taken the empty folder away
                    continue
                raise
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            if refusal is not None:
                file.close()
                raise refusal(holder) from None
            print(f"waiting for process {holder}, which writes {folder}", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:  # some network file systems know no locks: go on without
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
        if os.fstat(file.fileno()).st_nlink:  # 0: its holder has removed it meanwhile
            with disk_errors(folder):
                file.truncate(0)
                file.write(str(os.getpid()))
                file.flush()
            return file
        file.close()
    raise AssertionError("the loop ends by itself")


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def compilation_cache() -> Path:
    """Where JAX keeps compiled programs between processes: in the user's cache, a folder for each
    kind of processor, since code compiled for another one may not run here."""
    cpuinfo = Path("/proc/cpuinfo")
    processor = platform.machine() + platform.processor()
    if cpuinfo.exists():
        processor += cpuinfo.read_text().split("\n\n")[0].partition("flags")[2].partition("\n")[0]
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "gemma_jax" / "jax" / hashlib.sha256(processor.encode()).hexdigest()[:12]
