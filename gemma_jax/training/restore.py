"""Going on from a checkpoint: from the last one that is whole and belongs to the run.

Arrays are compared with the fingerprints that were taken of them before they were written. Without,
a flipped bit is read as another number: TensorStore's own checksums are those of its index (of 200
bits flipped in the files of a small checkpoint, it noticed none).
"""

import contextlib
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grain

from gemma_jax.errors import UserError
from gemma_jax.files import patiently
from gemma_jax.hosts import any_of, first_alone, is_first
from gemma_jax.training.bad_steps import watch_from_json
from gemma_jax.training.checkpoint import (
    check_metrics,
    check_values,
    checked,
    checkpoint_steps,
    checkpoints_of,
    other_model,
    read_item,
    saved_json,
)
from gemma_jax.training.metrics import read_metrics
from gemma_jax.training.step import TrainState

ASIDE = "set_aside"
_ELSEWHERE = "cannot be read by another process"
_MEND = "copy it again, or delete that folder to go on without it."


class _Unfit(Exception):  # noqa: N818
    """What a checkpoint is that it is not gone on from."""


def last_good(
    folder: Path,
    like: TrainState,
    batches: grain.DatasetIterator,
    *,
    is_same: Callable[[Any], bool] = lambda settings: True,
    up_to: int | None = None,
) -> TrainState | None:
    """The state of the last good checkpoint of a run folder; None where there is no checkpoint.

    Laid out as `like` (shapes with shardings); moves `batches` to its place in the stream. Those
    that are damaged, or of a run whose settings are not `is_same`, are moved aside, with a sentence
    each. Raises UserError where none is good, and leaves them where they are. With `up_to`, of the
    last one up to that step, and nothing is moved.
    """
    faults: dict[Path, str] = {}
    last = math.inf if up_to is None else up_to
    root = checkpoints_of(folder)
    steps = [step for step in checkpoint_steps(folder) if 0 < step <= last]
    for step in reversed(steps):
        place = root / str(step)
        state, fault = _attempt(place, step, like, batches, is_same)
        if state is not None and up_to is not None:
            return state
        if state is not None:
            for older in steps[: steps.index(step)]:
                other = root / str(older)
                unread: dict[Path, str] = {}
                with _noting(other, unread):
                    check_metrics(other)
                if any_of(bool(unread)):
                    faults[other] = unread.get(other, _ELSEWHERE)
            _set_aside(root.parent, faults, step)
            return state
        faults[place] = fault
    for place, fault in faults.items():  # the newest
        raise UserError(f"the checkpoint {place} {fault}; {_MEND}")
    if up_to is None and is_first() and (records := read_metrics(folder)):
        print(
            f"{root} holds no checkpoint: the run had come to step {records[-1]['step']}, and "
            "begins anew",
            file=sys.stderr,
        )
    return None


def _attempt(
    place: Path,
    step: int,
    like: TrainState,
    batches: grain.DatasetIterator,
    is_same: Callable[[Any], bool],
) -> tuple[TrainState | None, str]:
    faults: dict[Path, str] = {}
    state: Any = None
    with _noting(place, faults):
        state = patiently(
            lambda: _read(place, step, like, batches, is_same), place / "params", doing="read"
        )
    if not any_of(bool(faults)):
        with _noting(place, faults):  # by all processes together
            check_values(place, checked(state))
    if any_of(bool(faults)):
        return None, faults.get(place, _ELSEWHERE)
    return state, ""


@contextlib.contextmanager
def _noting(place: Path, faults: dict[Path, str]) -> Any:
    try:
        yield
    except _Unfit as error:
        faults[place] = str(error)
    except UserError:  # a file system that is away damages nothing
        raise
    except Exception as error:  # Orbax wraps what TensorStore says of damage in a bare one
        faults[place] = f"is damaged ({_first_line(error)})"


def _first_line(error: Exception) -> str:
    """What is wrong, in few words, of messages that may be pages long."""
    if isinstance(error, FileNotFoundError):
        return "a file is missing"
    if isinstance(error, (ValueError, KeyError)) and len(str(error)) < 80:
        return str(error).rstrip(".")
    return "it cannot be read"


def _read(
    place: Path,
    step: int,
    like: TrainState,
    batches: grain.DatasetIterator,
    is_same: Callable[[Any], bool],
) -> TrainState:
    check_metrics(place)
    check = saved_json(place, "check")
    if "fingerprints" not in check:
        raise _Unfit("is damaged (its fingerprints are missing)")
    settings = check.get("settings")
    if settings is not None and not is_same(settings):
        raise _Unfit("is of another run")
    if difference := other_model(place, "params", like.params):
        raise _Unfit(difference)
    progress = read_item(place, "progress", {"step": like.step, "opt_state": like.opt_state})
    if int(progress["step"]) != step:
        raise _Unfit(f"is damaged (it says that it is of step {int(progress['step'])})")
    params = read_item(place, "params", like.params)
    ema = None if like.ema is None else read_item(place, "ema", like.ema)
    watch = None
    if like.watch is not None:
        if not (seen := saved_json(place, "watch")):
            raise _Unfit("is damaged (it does not say what it has seen of bad steps)")
        watch = watch_from_json(seen, like.watch)
    position = saved_json(place, "data")
    if not position:
        raise _Unfit("is damaged (it does not say where in the data it is)")
    batches.set_state(position)
    return TrainState(progress["step"], params, progress["opt_state"], ema, watch)


def _set_aside(beside: Path, faults: dict[Path, str], step: int) -> None:
    for place, fault in faults.items():
        aside = beside / ASIDE / place.name
        number = 1
        while aside.exists():
            number += 1
            aside = aside.with_name(f"{place.name}-{number}")

        def move(place: Path = place, aside: Path = aside) -> None:
            if is_first():
                aside.parent.mkdir(exist_ok=True)
                place.rename(aside)

        first_alone(move)
        if is_first():
            print(
                f"the checkpoint {place} {fault}: it was moved to {aside}, and the run goes on "
                f"from step {step}",
                file=sys.stderr,
            )
