"""Makes the environments of the foreign clients: `.venv-clients/CLIENT`, once.

A client that cannot be had leaves `CLIENT.failed` with the reason, and its tests are skipped.
Standard library only.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2] / ".venv-clients"
# Versions that the figures in docs/parity.md were measured with, and the Pythons to try: wheels of
# torch for the CPU alone are had for few.
CLIENTS = {
    "transformers": (
        [
            *("torch==2.13.0", "transformers==5.23.0", "sentencepiece==0.2.3"),
            *("jinja2", "peft==0.21.2", "bitsandbytes==0.50.2"),
        ],
        ["3.11", "3.12", "3.13"],
    ),
    "llama_cpp": (["xllamacpp==2026.10.11549", "numpy>=2"], ["3.12", "3.13"]),
    "mlx": (["mlx-lm==0.32.2", "mlx[cpu]"], ["3.12", "3.13", "3.11"]),
}


def main() -> None:
    for client, (packages, pythons) in CLIENTS.items():
        folder, failed = ROOT / client, ROOT / f"{client}.failed"
        recipe = " ".join(packages)
        stamp = folder / "installed"
        if stamp.exists() and stamp.read_text() == recipe:
            continue
        print(f"tests/clients: installing {recipe} into {folder}", file=sys.stderr, flush=True)
        failed.unlink(missing_ok=True)
        try:
            _install(folder, packages, pythons)
            stamp.write_text(recipe)
        except (OSError, RuntimeError) as error:
            shutil.rmtree(folder, ignore_errors=True)
            failed.write_text(str(error))
            print(f"tests/clients: {client} is left out: {error}", file=sys.stderr)


def _install(folder: Path, packages: list[str], pythons: list[str]) -> None:
    reasons = []
    for version in pythons:
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(exist_ok=True)
        python = str(folder / "bin" / "python")
        try:
            if shutil.which("uv"):
                _run("uv", "venv", "--quiet", "--python", version, str(folder))
                _run("uv", "--quiet", "pip", "install", "--python", python, *packages)
            else:
                _run(_find(version), "-m", "venv", str(folder))
                _run(python, "-m", "pip", "-q", "install", *packages)
            return
        except RuntimeError as error:
            reasons.append(f"Python {version}: {error}")
    raise RuntimeError("; ".join(reasons))


def _find(version: str) -> str:
    """A Python of this version that runs and can make environments."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    found = [f"python{version}", *map(str, pyenv.glob(f"{version}.*/bin/python"))]
    for python in [*found, sys.executable]:
        code = "import ensurepip, sys, venv; print('%d.%d' % sys.version_info[:2])"
        try:
            answer = subprocess.run([python, "-c", code], capture_output=True, text=True)
        except OSError:
            continue
        if answer.stdout.strip() == version:
            return python
    raise RuntimeError("not found")


def _run(*command: str) -> None:
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode:
        last = [line for line in process.stderr.splitlines() if line.strip()][-3:]
        raise RuntimeError(" ".join(last) or f"{command[0]} ended with {process.returncode}")


if __name__ == "__main__":
    main()
