"""Jobs for the foreign clients, each of which runs in an environment of its own (`install.py`)."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

FOLDER = Path(__file__).parent
ENVIRONMENTS = FOLDER.parents[1] / ".venv-clients"
VERSIONS: dict[str, str] = {}  # of the clients that ran


def run(
    client: str, jobs: list[dict[str, Any]], folder: Path, script_name: str | None = None
) -> None:
    """Hands `jobs` to run_CLIENT.py, or another script for the same environment, which writes into
    the jobs' own folders.

    Skips the test where the client could not be installed.
    """
    environment = ENVIRONMENTS / client
    failure = environment.with_suffix(".failed")
    if failure.exists():
        pytest.skip(f"{client} could not be installed: {failure.read_text()[-300:]}")
    if not (environment / "installed").exists():
        pytest.skip(f"{client} is not installed; ./launch.sh test clients does that")
    path = folder / f"{client}.json"
    path.write_text(json.dumps(jobs))
    script = FOLDER / f"run_{script_name or client}.py"
    command = [str(environment / "bin" / "python"), str(script), str(path)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode:
        sys.stderr.write(process.stderr)
        pytest.fail(f"{script.name} ended with {process.returncode}: {process.stderr[-1000:]}")
    VERSIONS[client] = process.stdout.splitlines()[0]


def logits(folder: Path, count: int) -> list[np.ndarray]:
    """[T, V] of each text, left on disk until they are looked at."""
    error = folder / "error.txt"
    assert not error.exists(), f"{folder.name}: {error.read_text()}"
    return [np.load(folder / f"logits_{i}.npy", mmap_mode="r") for i in range(count)]
