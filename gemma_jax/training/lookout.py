"""The host's side of bad steps: it names them, keeps what running them again needs, and stops."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import jax

from gemma_jax.errors import UserError
from gemma_jax.files import read_json_lines, write_text
from gemma_jax.hosts import is_first
from gemma_jax.training.bad_steps import Skip, Stop
from gemma_jax.training.checkpoint import Checkpoints
from gemma_jax.training.step import Metrics, TrainState

FILE = "bad_steps.jsonl"
INNER = ("bad_step", "bad_in_row", "skipped")  # metrics of a step that are for the lookout
_KEPT = 3  # bad steps before which a checkpoint is kept
_MEND = (
    "Lower optimizer.learning_rate, set optimizer.clip_norm, or leave such steps out with "
    "train.on_bad_step=Skip()."
)
_MEND_SKIPPED = (
    "Lower optimizer.learning_rate, set optimizer.clip_norm, or raise Skip's most or its bounds."
)


type Records = dict[str, list[int]]  # what a batch is made of: numbers, by what they are of


class BadSteps:
    """The bad steps of a run, a line each in its folder; those after `start` are done again."""

    def __init__(self, folder: Path, start: int) -> None:
        self._path = folder / FILE
        self._found = [x for x in read_json_lines(self._path) if x.get("step", start + 1) <= start]

    def add(self, found: dict[str, Any]) -> None:
        self._found.append(found)
        if is_first():
            write_text(self._path, "".join(json.dumps(one) + "\n" for one in self._found))

    def steps(self) -> list[int]:
        """The last few."""
        return [one["step"] for one in self._found[-_KEPT:]]


class Lookout:
    """Is told of every step, and looks at those since the last look when numbers are fetched."""

    def __init__(
        self,
        name: str,
        setting: Stop | Skip,
        bad: BadSteps,
        checkpoints: Checkpoints,
        records: Callable[[int], Records],
    ) -> None:
        self._name, self._setting, self._bad = name, setting, bad
        self._checkpoints, self._records = checkpoints, records
        self._steps: list[tuple[int, Any, Metrics]] = []

    def note(self, step: int, position: Any, metrics: Metrics) -> None:
        """`position` is that of the data before the step."""
        self._steps.append((step, position, metrics))

    def look(self, state: TrainState) -> None:
        """Tells of bad steps; raises UserError where the run has to stop, with its state saved."""
        steps, self._steps = self._steps, []
        flags = jax.device_get([(m["bad_step"], m["bad_in_row"]) for _, _, m in steps])
        for (step, position, metrics), (bad, in_row) in zip(steps, flags, strict=True):
            if bad != step:
                continue
            values = {x: float(metrics[x]) for x in ("loss", "grad_norm", "param_norm")}
            records = self._records(step)
            self._bad.add({"step": step, **{n: _plain(x) for n, x in values.items()}, **records})
            said = (
                f"the loss is {values['loss']:.4g} and the gradient norm "
                f"{values['grad_norm']:.4g} at step {step} ({_named(records)})"
            )
            if isinstance(self._setting, Stop):
                self._stop(said, step, position, state, math.isfinite(values["param_norm"]))
            elif in_row > self._setting.most:
                self._checkpoints.wait()
                raise UserError(
                    f"{said}, the bad step number {in_row} in a row, and train.on_bad_step lets "
                    f"{self._setting.most} pass. {_MEND_SKIPPED}"
                )
            elif is_first():
                print(f"{self._name}: {said}; it was skipped", file=sys.stderr)

    def _stop(
        self, said: str, step: int, position: Any, state: TrainState, whole: bool
    ) -> NoReturn:
        before = step - 1
        if whole and before > (self._checkpoints.latest_step() or 0):
            self._checkpoints.save(state, position, {})
        self._checkpoints.wait()
        if whole:
            said += f"; the state before it is kept, and --replay {step} runs it once more"
        last = self._checkpoints.latest_step() or 0
        raise UserError(f"{said}; the last checkpoint is of step {last}. {_MEND}")


def _named(records: Records) -> str:
    parts = []
    for name, numbers in records.items():
        some = ", ".join(map(str, numbers[:4])) + (", ..." if len(numbers) > 4 else "")
        parts.append(f"{name} {some}")
    return "; ".join(parts)


def _plain(value: float) -> float | str:
    """JSON has no word for what is not finite."""
    return value if math.isfinite(value) else repr(value)
