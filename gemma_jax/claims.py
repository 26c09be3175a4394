"""Who may train in a run folder, and for which settings it was begun."""

import contextlib
import importlib.metadata
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from gemma_jax.adapted import FILE as ADAPTER
from gemma_jax.data.token_set import MANIFEST_FILE
from gemma_jax.errors import UserError
from gemma_jax.files import locked, read_json, write_json
from gemma_jax.hosts import is_first
from gemma_jax.runs import CONVERSATIONS, EXPERIMENT, MODEL, RESULT, TOKENIZER
from gemma_jax.settings import differences, to_json
from gemma_jax.training.checkpoint import ELSEWHERE, checkpoint_steps
from gemma_jax.training.checkpoint import FOLDER as CHECKPOINTS
from gemma_jax.training.lookout import FILE as BAD_STEPS
from gemma_jax.training.metrics import FILE as METRICS
from gemma_jax.training.metrics import read_metrics

LOCK = ".train.lock"  # another name than that of token sets, which may lie in the same folder

# What may differ between two starts of one run: it changes how the run is watched or laid out, not
# what it computes.
_FREE = (
    *("train.", "mesh.", "model.remat", "model.unroll"),
    *("model.attn_backend", "model.head_backend"),
)
_BOUND = ("train.microbatches", "train.ema_decay")


@contextlib.contextmanager
def held(folder: Path) -> Iterator[Callable[[], float]]:
    """Holds a run folder for this process, or refuses one that another process trains in.

    Yields what gives the seconds spent on the run so far, those of earlier starts included. A run
    that is refused before it has saved anything lets go of the folder, so that the mended
    experiment may have it. Of several hosts the first alone does any of this.
    """
    began = time.time()
    if jax.process_index() != 0:
        yield lambda: time.time() - began
        return

    with alone(folder):
        before = _claim_of(folder)
        # Its checkpoints may be on a disk that is not there now.
        has_begun = before is not None and bool(read_metrics(folder))
        earlier = (before or {}).get("earlier_s", 0)
        try:
            yield lambda: earlier + time.time() - began
        except UserError:
            if not has_begun:
                _let_go(folder)
            raise
        finally:
            # A disk that is full has ended the run, and its sentence is the one to be read.
            with contextlib.suppress(UserError):
                if not (folder / RESULT).exists() and (claim := _claim_of(folder)) is not None:
                    claim["earlier_s"] = round(earlier + time.time() - began, 1)
                    write_json(folder / EXPERIMENT, claim)


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keeps other processes from training in a run folder; of several hosts the first does it."""

    def refusal(process: str) -> UserError:
        return UserError(
            f"{folder} is being trained by process {process}; wait for it, or stop it."
        )

    with locked(folder, refusal, name=LOCK) if is_first() else contextlib.nullcontext():
        yield


def _let_go(folder: Path) -> None:
    """Removes what a run has left that has saved nothing; its records stay, if there are any."""
    if checkpoint_steps(folder):
        return
    (folder / EXPERIMENT).unlink(missing_ok=True)
    for name in (MODEL, ADAPTER, CONVERSATIONS):
        (folder / name).unlink(missing_ok=True)
    if not (folder / MANIFEST_FILE).exists():  # then it is the tokenizer of a token set
        (folder / TOKENIZER).unlink(missing_ok=True)
    if not read_metrics(folder):
        for name in (METRICS, BAD_STEPS, ELSEWHERE):
            (folder / name).unlink(missing_ok=True)
        for name in (CHECKPOINTS, "tensorboard"):
            shutil.rmtree(folder / name, ignore_errors=True)


def check_claim(folder: Path, experiment: Any) -> None:
    """Refuses a run folder that holds another experiment; writes nothing."""
    claim = _claim_of(folder)
    if claim is None:
        return
    for name, here, there in conflicts(experiment, claim["experiment"]):
        raise UserError(
            f"{folder} holds a run with {name}={there!r}, and this one has {here!r}; give "
            "the experiment another name, or remove the folder."
        )


def conflicts(settings: Any, saved: Any) -> list[tuple[str, Any, Any]]:
    """(path, here, there) where settings differ from saved ones in what they compute."""
    return [found for found in differences(settings, saved) if not _is_free(found[0])]


def _claim_of(folder: Path) -> dict[str, Any] | None:
    path = folder / EXPERIMENT
    if not path.exists():
        return None
    claim = read_json(path, "the settings of a run")
    if missing := {"experiment", "commit", "versions"} - claim.keys():
        raise UserError(f"{path} does not say {min(missing)}; copy it again, or remove the folder.")
    return claim


def claim(folder: Path, experiment: Any) -> None:
    """Takes a run folder for an experiment, or refuses one that holds another.

    The commit and the versions of the first start stay; those of a later start that differ are
    appended to `resumed_with`.
    """
    check_claim(folder, experiment)
    if jax.process_index() != 0:
        return
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain")
    versions = {name: importlib.metadata.version(name) for name in names}
    now = {"commit": commit(), "versions": versions}
    saved = _claim_of(folder)
    if saved is None:
        write_json(folder / EXPERIMENT, {"experiment": to_json(experiment), **now})
        return
    later = saved.get("resumed_with", [])
    known = [(start["commit"], start["versions"]) for start in (saved, *later)]
    if (now["commit"], now["versions"]) not in known:
        write_json(folder / EXPERIMENT, saved | {"resumed_with": [*later, now]})


def _is_free(path: str) -> bool:
    """Whether a setting, the run's own or that of a teacher inside it, may differ."""
    own = path.rpartition("teacher.")[2].removeprefix("objective.").removeprefix("shards.")
    return own.startswith(_FREE) and not own.startswith(_BOUND)


def commit() -> str | None:
    """The commit of the package's checkout, with + where it has changes; None outside of one."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
