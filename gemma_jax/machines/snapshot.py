"""The code that a job runs: the commit of the checkout, with its changes and new files."""

import dataclasses
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from gemma_jax.errors import UserError
from gemma_jax.machines.shell import require

_TOO_LARGE = 100 * 2**20  # bytes; a tree over this holds data that were not meant to travel


@dataclasses.dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A tree of git objects. What git ignores (`runs/`, `.venv`) is not in it."""

    root: Path
    tree: str

    @property
    def archive_name(self) -> str:
        return f"{self.tree[:16]}.tar.gz"

    def write(self, path: Path) -> None:
        """Writes it as a .tar.gz file."""
        _git(self.root, "archive", "--format=tar.gz", f"--output={path}", self.tree)

    def unpack(self, folder: Path) -> None:
        """Writes its files into `folder`, which is made."""
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as aside:
            archive = Path(aside) / "code.tar"
            _git(self.root, "archive", "--format=tar", f"--output={archive}", self.tree)
            subprocess.run(["tar", "-xf", archive, "-C", folder], check=True)

    def check_files(self, command: Sequence[str]) -> None:
        """Refuses a command that names a file of this folder which would not travel."""
        for word in command:
            path = Path(word)
            if word.endswith(".py") and not path.exists():
                raise UserError(f"{word} does not exist; name the experiment file from here.")
            if not path.is_file():
                continue
            inside = path.resolve().is_relative_to(self.root)
            if path.is_absolute() or not inside or not _git(self.root, "ls-tree", self.tree, word):
                raise UserError(
                    f"{word} would not reach the machines: it has to lie under {self.root}, be "
                    "named from there and not be ignored by git; move it."
                )


def take(folder: Path) -> Snapshot:
    """The checkout that `folder` is the top of, as it stands now."""
    require("git")
    try:
        root = Path(_git(folder, "rev-parse", "--show-toplevel"))
        _git(root, "rev-parse", "HEAD")
    except subprocess.CalledProcessError:
        raise _refusal(folder, "is not in a git checkout that has a commit") from None
    if root != folder.resolve() or not (root / "launch.sh").exists():
        raise _refusal(folder, "is not the top of a checkout with launch.sh in it")
    if _git(root, "ls-files", "--unmerged"):
        raise _refusal(folder, "has files with merge conflicts")
    with tempfile.TemporaryDirectory() as aside:
        index = {"GIT_INDEX_FILE": str(Path(aside) / "index")}  # the user's own stays as it is
        try:
            _git(root, "read-tree", "HEAD", env=index)
            _git(root, "add", "--all", env=index)
            tree = _git(root, "write-tree", env=index)
        except subprocess.CalledProcessError as error:
            said = (error.stderr or "").strip().splitlines() or ["git gave no reason"]
            raise _refusal(folder, f"cannot be archived ({said[-1]})") from None
    listed = _git(root, "ls-tree", "-r", "--format=%(objectsize) %(path)", tree)
    sizes = [line.split(" ", 1) for line in listed.splitlines()]
    total = sum(int(size) for size, _ in sizes if size != "-")
    if total > _TOO_LARGE:
        largest = max(sizes, key=lambda entry: int(entry[0]) if entry[0] != "-" else 0)[1]
        raise _refusal(folder, f"has {total / 2**20:.0f} MiB of files, the largest {largest}")
    return Snapshot(root=root, tree=tree)


def _refusal(folder: Path, why: str) -> UserError:
    return UserError(
        f"{folder} {why}, and the machines get their code from there; start this in the folder of "
        "launch.sh, with large files ignored by git and conflicts resolved."
    )


def _git(folder: Path, *arguments: str, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments],
        env=os.environ | (env or {}),
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()
