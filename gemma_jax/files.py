"""Files that are either whole or absent: write aside, flush to disk, then rename."""

import contextlib
import errno
import fcntl
import hashlib
import itertools
import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from gemma_jax.errors import UserError

PARTIAL_SUFFIX = ".partial"

PATIENCE_S = 120.0  # with a file system that does not answer; a server starts again in less
_PAUSES_S = (1.0, 2.0, 4.0, 8.0, 15.0)  # the last one again and again
_AWAY = (
    *(errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EREMOTEIO, errno.ENOLINK),
    *(errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH),
    *(errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED),
)
_has_written: set[str] = set()  # the folders that this process has written to

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


def patiently[T](
    work: Callable[[], T],
    path: str | Path,
    *,
    doing: str = "write",
    before_again: Callable[[], None] = lambda: None,
) -> T:
    """What `work` returns, which writes (or reads: `doing`) `path`, and may be called again.

    A file system that is away for the moment, or read-only though this process has written there,
    is waited for, with a message; after PATIENCE_S raises UserError. What no waiting mends is
    raised at once. The errors of TensorStore and ArrayRecord are known by their texts.
    """
    folder, began, said = os.path.dirname(path), time.monotonic(), False
    for attempt in itertools.count():
        try:
            if attempt:
                before_again()
            result = work()
        except (OSError, ValueError, RuntimeError) as error:
            number = None if isinstance(error, UserError) else error_number(error)
            read_only = number == errno.EROFS and folder in _has_written
            if number is None or not (number in _AWAY or read_only):
                raise
            cause, waited = os.strerror(number), time.monotonic() - began
            if waited > PATIENCE_S:
                raise UserError(
                    f"cannot {doing} {path}: {cause}, for {waited:.0f} seconds; run the same "
                    "command again when the file system is back."
                ) from error
            if not said:
                left = f"trying again for {PATIENCE_S:.0f} seconds"
                print(f"cannot {doing} {path}: {cause}; {left}", file=sys.stderr, flush=True)
                said = True
            time.sleep(_PAUSES_S[min(attempt, len(_PAUSES_S) - 1)])
        else:
            if doing == "write":
                _has_written.add(folder)
            return result
    raise AssertionError("the loop ends by itself")


def error_number(error: BaseException) -> int | None:
    """The operating system's number for an error, also one that a library has put in a text."""
    if isinstance(error, OSError):
        return error.errno
    if told := re.search(r"os_error_code='(\d+)'", str(error)):
        return int(told[1])
    known = (*_AWAY, *_FULL, errno.EROFS)
    return next((number for number in known if os.strerror(number) in str(error)), None)


def write_bytes(path: str | Path, content: bytes) -> None:
    """Writes `content` to `path` so that a reader sees the old or the new file, never a part."""
    path = on_disk(path)

    def write() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(path.name + PARTIAL_SUFFIX)
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)

    with disk_errors(path):
        patiently(write, path)


def on_disk(path: str | Path) -> Path:
    """The path, refused if it is in a bucket: see `buckets`."""
    if str(path).startswith("gs:/"):  # as Path writes it
        raise UserError(
            f"{path} is in a bucket, where finished data are read and checkpoints kept "
            "(train.checkpoints) and nothing else; choose a folder on disk."
        )
    return Path(path)


def read_bytes(path: Path) -> bytes:
    return patiently(path.read_bytes, path, doing="read")


def write_text(path: str | Path, content: str) -> None:
    write_bytes(path, content.encode())


def write_json(path: str | Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: str | Path, what: str) -> dict[str, Any]:
    """Reads a JSON object; `what` names it in the error ("the manifest of a token set")."""
    try:
        path = Path(path) if isinstance(path, str) else path
        value = json.loads(patiently(path.read_text, path, doing="read"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; it should be {what}.") from None
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); it should be {what}.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); it should be {what}.") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is not {what}: it holds no JSON object; copy it again.")
    return value


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file of lines, in order; none of one that is not there. A line that was
    cut off, by a crash say, or damaged is left out."""
    found = []
    for line in read_bytes(path).splitlines() if path.exists() else ():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


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
    folder = on_disk(folder)
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


def cache() -> Path:
    """What can be made again, of this user."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "gemma_jax"


def compilation_cache() -> Path:
    """Where JAX keeps compiled programs between processes: in the user's cache, a folder for each
    kind of processor, since code compiled for another one may not run here."""
    cpuinfo = Path("/proc/cpuinfo")
    processor = platform.machine() + platform.processor()
    if cpuinfo.exists():
        processor += cpuinfo.read_text().split("\n\n")[0].partition("flags")[2].partition("\n")[0]
    return cache() / "jax" / hashlib.sha256(processor.encode()).hexdigest()[:12]


class Lines:
    """A file of lines that grows. A line is there whole or, until it is written again, not at all:
    what an attempt has left of one is cut off by the next."""

    def __init__(self, path: Path, lines: str) -> None:
        """Begins with `lines` in the place of what is there."""
        self.path = path
        write_text(path, lines)
        self._size = len(lines.encode())

    def add(self, line: str) -> None:
        content = line.encode()

        def write() -> None:
            with self.path.open("r+b") as file:
                file.truncate(self._size)
                file.seek(self._size)
                file.write(content)

        with disk_errors(self.path):
            patiently(write, self.path)
        self._size += len(content)

    def sync(self) -> None:
        """Returns when the lines are on disk."""

        def sync() -> None:
            with self.path.open("rb") as file:
                os.fsync(file.fileno())

        with disk_errors(self.path):
            patiently(sync, self.path)
