"""The code that travels, and what is refused."""

import subprocess
from pathlib import Path

import pytest

from gemma_jax.errors import UserError
from gemma_jax.machines import snapshot

from .conftest import git


def files(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def test_changes_and_new_files_travel_and_nothing_here_changes(
    checkout: Path, tmp_path: Path
) -> None:
    def state() -> str:
        argv = ["git", "status", "--porcelain"]
        return subprocess.run(argv, cwd=checkout, capture_output=True, text=True).stdout

    before = state()
    taken = snapshot.take(checkout)
    taken.unpack(tmp_path / "there")
    found = files(tmp_path / "there")
    assert sorted(found) == [".gitignore", "launch.sh", "mine.py", "new.py"]
    assert found["launch.sh"] == "changed\n"
    assert state() == before
    taken.write(tmp_path / taken.archive_name)
    listed = subprocess.run(["tar", "-tzf", tmp_path / taken.archive_name], capture_output=True)
    assert b"new.py" in listed.stdout
    assert snapshot.take(checkout).tree == taken.tree
    (checkout / "new.py").write_text("other\n")
    assert snapshot.take(checkout).tree != taken.tree


def test_what_cannot_travel(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="is not in a git checkout"):
        snapshot.take(tmp_path)
    (checkout / "below").mkdir()
    with pytest.raises(UserError, match="is not the top of a checkout"):
        snapshot.take(checkout / "below")
    monkeypatch.setattr(snapshot, "_TOO_LARGE", 100)
    (checkout / "large file").write_text("x" * 101)
    with pytest.raises(UserError, match="the largest large file"):
        snapshot.take(checkout)
    taken = snapshot.Snapshot(root=checkout, tree="HEAD")
    taken.check_files(["train", "mine.py", "no_file"])
    for word in ("ignored.py", str(checkout / "mine.py"), "../else.py"):
        (tmp_path / "else.py").touch()
        with pytest.raises(UserError, match="would not reach the machines"):
            taken.check_files([word])


def test_a_conflict_is_refused(checkout: Path) -> None:
    git(checkout, "add", ".")
    git(checkout, "commit", "-qm", "ours")
    git(checkout, "checkout", "-qb", "theirs", "HEAD~1")
    (checkout / "launch.sh").write_text("theirs\n")
    git(checkout, "commit", "-qam", "theirs")
    with pytest.raises(subprocess.CalledProcessError):
        git(checkout, "merge", "-q", "-")
    with pytest.raises(UserError, match="merge conflicts"):
        snapshot.take(checkout)
