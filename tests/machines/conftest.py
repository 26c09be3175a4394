"""A checkout of its own, and stand-ins for gcloud, xpk, sbatch and their like on PATH.

A stand-in writes its argv to a file and answers by rules: a pattern of the command line, and what
is said the first, second, ... time that it is matched (the last answer is repeated). Nothing else
is on PATH, so that no test can reach a real cloud.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gemma_jax import cli

PROGRAMS = ("gcloud", "xpk", "kubectl", "sbatch", "squeue", "scancel")
STAND_IN = f"""#!{sys.executable} -SE
import fcntl, json, os, re, sys
folder = os.path.dirname(os.path.realpath(__file__))
argv = [os.path.basename(sys.argv[0]), *sys.argv[1:]]
with open(folder + "/calls", "a+") as calls:
    fcntl.flock(calls, fcntl.LOCK_EX)
    calls.seek(0)
    before = [" ".join(json.loads(line)) for line in calls]
    calls.write(json.dumps(argv) + "\\n")
text = " ".join(argv)
for pattern, answers in json.load(open(folder + "/rules")).items():
    if re.search(pattern, text):
        matched = sum(bool(re.search(pattern, line)) for line in before)
        code, out, err = answers[min(matched, len(answers) - 1)]
        sys.stdout.write(out)
        sys.stderr.write(err)
        sys.exit(code)
"""
EXPERIMENT = "raise SystemExit('read on this machine')\n"


class Cloud:
    """The stand-ins: what they are to answer, and what they were asked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        script = folder / "stand_in"
        script.write_text(STAND_IN)
        script.chmod(0o755)
        for program in PROGRAMS:
            (folder / program).symlink_to(script)
        for tool in ("git", "tar", "gzip"):
            (folder / tool).symlink_to(str(shutil.which(tool)))
        self.answer({})

    def answer(self, rules: dict[str, Any]) -> None:
        """Each rule's answers are texts for stdout, or (exit code, stdout, stderr)."""
        full = {
            pattern: [(0, said, "") if isinstance(said, str) else said for said in answers]
            for pattern, answers in rules.items()
        }
        (self.folder / "rules").write_text(json.dumps(full))

    @property
    def calls(self) -> list[list[str]]:
        path = self.folder / "calls"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def verbs(self) -> list[str]:
        """A short name for each call of gcloud, in order."""
        return [_short(" ".join(argv)) for argv in self.calls]


def _short(line: str) -> str:
    names = ("create", "delete", "tpu-vm describe", "describe", "cp", "scp")
    if found := re.search(r"worker\.sh (\w+)", line):
        return found[1]
    return next(name for name in names if f" {name} " in line)


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git checkout that is stood in, with a file that git ignores and a change not committed."""
    root = tmp_path / "check out"
    root.mkdir()
    (root / "launch.sh").write_text("old\n")
    (root / "mine.py").write_text(EXPERIMENT)
    (root / ".gitignore").write_text("runs/\nignored.py\n")
    for line in ("init -q", "add .", "commit -qm first"):
        git(root, *line.split())
    (root / "launch.sh").write_text("changed\n")
    (root / "new.py").write_text(EXPERIMENT)
    (root / "ignored.py").write_text(EXPERIMENT)
    monkeypatch.chdir(root)
    return root


def git(folder: Path, *arguments: str) -> None:
    who = {
        f"GIT_{role}_{what}": "x" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")
    }
    subprocess.run(["git", *arguments], cwd=folder, env=os.environ | who, check=True)


@pytest.fixture
def cloud(tmp_path: Path, checkout: Path, monkeypatch: pytest.MonkeyPatch) -> Cloud:
    found = Cloud(tmp_path / "bin")
    monkeypatch.setenv("PATH", str(found.folder))
    return found


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[[str], tuple[int, str, str]]:
    """Runs a command line in this process: exit code, stdout, stderr."""

    def run(line: str) -> tuple[int, str, str]:
        code: Any = 0
        try:
            cli.main(line.split())
        except SystemExit as ended:
            code = ended.code
        out, err = capsys.readouterr()
        return code, out, err

    return run
