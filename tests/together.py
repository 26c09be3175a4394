"""Runs a command in several processes, which share some devices."""

import json
import socket
import subprocess
import sys
from pathlib import Path

from command_line import environment

SCRIPT = Path(__file__).with_name("one_of_several.py")
DEVICES = 8


def start_together(
    folder: Path, argv: list[str], count: int, devices: int = DEVICES
) -> list[subprocess.Popen]:
    """The processes. Of several commands with `then` between them, the first gets what makes them
    one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    end = argv.index("then") if "then" in argv else len(argv)
    started = []
    for number in range(count):
        one = f"--coordinator 127.0.0.1:{port} --num-processes {count} --process-id {number}"
        own = [*argv[:end], *(one.split() if count > 1 else []), *argv[end:]]
        started.append(
            subprocess.Popen(
                [sys.executable, str(SCRIPT), str(folder / f"read{number}.json"), *own],
                env=environment() | {"JAX_NUM_CPU_DEVICES": str(devices // count)},
                cwd=folder,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return started


def ends(started: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    """Their exit codes, stdout and stderr."""
    outputs = [process.communicate(timeout=400) for process in started]
    return [(one.returncode, *text) for one, text in zip(started, outputs, strict=True)]


def end_together(
    folder: Path, argv: list[str], count: int, devices: int = DEVICES
) -> list[tuple[int, str, str]]:
    return ends(start_together(folder, argv, count, devices))


def run_together(folder: Path, argv: list[str], count: int) -> tuple[list[dict], str]:
    """The same for commands that succeed: the notes of each process, and the results."""
    done = end_together(folder, argv, count)
    for code, _, err in done:
        assert code == 0, err
    assert done[0][1]
    assert not any(out for _, out, _ in done[1:])  # results are printed once
    notes = [json.loads((folder / f"read{number}.json").read_text()) for number in range(count)]
    return notes, done[0][1]
