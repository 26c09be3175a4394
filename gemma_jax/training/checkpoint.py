"""Checkpoints of a training run, with Orbax: asynchronous, atomic, restorable to any mesh.

One checkpoint holds `params` (and `ema`) apart from `progress` (step and optimizer state) and
`data` (the position of the batch stream, the same for all hosts, so that another number of them
can go on), and a reader of the weights touches nothing else.
"""

import contextlib
import gc
import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from gemma_jax.errors import UserError
from gemma_jax.files import disk_errors
from gemma_jax.training.step import TrainState

FOLDER = "checkpoints"
BEST_METRIC = "valid/bits_per_byte"


class Checkpoints:
    """The checkpoints of a run folder: the last `keep_last`, and the `keep_best` of validation."""

    def __init__(self, folder: Path, *, keep_last: int = 2, keep_best: int = 1) -> None:
        policies = checkpoint_managers.AnyPreservationPolicy(
            [checkpoint_managers.LatestN(keep_last), _Best(keep_best)]
        )
        self._folder = folder / FOLDER
        _check_metrics(folder)
        with disk_errors(self._folder):
            self._manager = ocp.CheckpointManager(
                self._folder.absolute(),
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=policies,
                    # Without it metrics are not written, and the best is forgotten at a restart.
                    best_fn=lambda metrics: -_score(metrics),
                    cleanup_tmp_directories=True,
                ),
            )

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """The step of the best checkpoint by validation, None where none was measured."""
        return self._manager.best_step()

    def save(
        self, state: TrainState, batches: grain.DatasetIterator, metrics: dict[str, float]
    ) -> None:
        """Starts to write; the arrays are copied off the device before this returns."""
        items: dict[str, Any] = {
            "params": ocp.args.StandardSave(state.params),
            "progress": ocp.args.StandardSave({"step": state.step, "opt_state": state.opt_state}),
            "data": ocp.args.JsonSave(batches.get_state()),
        }
        if state.ema is not None:
            items["ema"] = ocp.args.StandardSave(state.ema)
        with write_errors(self._folder):
            self._manager.save(int(state.step), args=ocp.args.Composite(**items), metrics=metrics)

    def restore(self, step: int, like: TrainState, batches: grain.DatasetIterator) -> TrainState:
        """The state at `step`, laid out as `like` (shapes, shardings); moves `batches` there."""
        items: dict[str, Any] = {
            "params": ocp.args.StandardRestore(like.params),
            "progress": ocp.args.StandardRestore({"step": like.step, "opt_state": like.opt_state}),
            "data": ocp.args.JsonRestore(),
        }
        if like.ema is not None:
            items["ema"] = ocp.args.StandardRestore(like.ema)
        place = self._folder / str(step)
        try:
            _check_shapes(place, place.absolute() / "params", like.params)
            restored = self._manager.restore(step, args=ocp.args.Composite(**items))
            if not isinstance(restored["data"], dict):
                raise ValueError("the position of the batch stream is none")
            batches.set_state(restored["data"])
        except UserError:
            raise
        except Exception as error:  # Orbax wraps what TensorStore says of damage in a bare one
            raise _damaged(place) from error
        progress = restored["progress"]
        return TrainState(
            progress["step"], restored["params"], progress["opt_state"], restored.get("ema")
        )

    def wait(self) -> None:
        """Returns when everything that was saved is on disk."""
        with write_errors(self._folder):
            self._manager.wait_until_finished()

    def close(self) -> None:
        with write_errors(self._folder):
            self._manager.close()


@contextlib.contextmanager
def write_errors(folder: Path) -> Iterator[None]:
    """`disk_errors`, also where TensorStore hands on the disk's error in the text of its own."""
    with disk_errors(folder):
        try:
            yield
        except ValueError as error:
            number = re.search(r"os_error_code='(\d+)'", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), str(error)) from error


def checkpoint_steps(folder: str | Path) -> list[int]:
    """The steps for which a run folder holds a whole checkpoint, in order."""
    found = (Path(folder) / FOLDER).glob("*")
    return sorted(int(path.name) for path in found if path.name.isdigit())


def load_params(folder: str | Path, like: Any, step: int | None = None) -> Any:
    """The weights of a run folder: of `step`, or of its last checkpoint; the average where kept.

    `like` is the tree of shapes (with shardings where wanted) of the model they should fit.
    """
    item = weights_folder(folder, step)
    place, steps = Path(folder) / FOLDER / item.parent.name, checkpoint_steps(folder)
    try:
        _check_shapes(place, item, like)
        with contextlib.closing(ocp.StandardCheckpointHandler()) as reader:
            params = reader.restore(item, args=ocp.args.StandardRestore(like))
        gc.collect()  # Orbax leaves what it has read in reference cycles, as large as the model
        return params
    except UserError:
        raise
    except Exception as error:  # as above
        raise UserError(
            f"the checkpoint {place} is damaged; copy it again, or give another one of the run, "
            f"which has {steps}."
        ) from error


def weights_folder(folder: str | Path, step: int | None = None) -> Path:
    """Where a checkpoint keeps the weights to use: of `step` or the last; the average if kept."""
    steps = checkpoint_steps(folder)
    if not steps:
        raise UserError(
            f"{folder} holds no checkpoint; give the folder of a run that has saved one."
        )
    if step is not None and step not in steps:
        raise UserError(f"{folder} has no checkpoint of step {step}; it has {steps}.")
    place = Path(folder) / FOLDER / str(steps[-1] if step is None else step)
    return place.absolute() / ("ema" if (place / "ema").exists() else "params")


def _check_shapes(place: Path, item: Path, like: Any) -> None:
    # The handler alone: a `Checkpointer` would ask this item for what its checkpoint has, and warn.
    with contextlib.closing(ocp.StandardCheckpointHandler()) as reader:
        saved = reader.metadata(item)
    if saved is None:
        raise ValueError("its weights cannot be read")
    _same_shapes(like, saved.tree, place)


def _damaged(place: Path) -> UserError:
    return UserError(
        f"the checkpoint {place} is damaged; copy it again, or delete that folder to go on from "
        "the one before."
    )


def _score(metrics: Any) -> float:
    """What the best checkpoint has least of; infinite for one that was not validated."""
    return metrics.get(BEST_METRIC, math.inf) if isinstance(metrics, dict) else math.inf


class _Best(checkpoint_managers.PreservationPolicy):
    """Keeps the `n` best checkpoints, of those alone that were validated.

    Orbax's own `BestN` asks for metrics in all or warns at each checkpoint without.
    """

    def __init__(self, n: int) -> None:
        self._n = n

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        validated = [one for one in checkpoints if math.isfinite(_score(one.metrics))]
        best = sorted(validated, key=lambda one: _score(one.metrics))[: self._n]
        return [one in best for one in checkpoints]


def _check_metrics(folder: Path) -> None:
    """Orbax reads the metrics of every checkpoint when it opens the folder."""
    for step in checkpoint_steps(folder):
        place = folder / FOLDER / str(step)
        with contextlib.suppress(FileNotFoundError):
            try:
                json.loads((place / "metrics" / "metrics").read_text())
            except ValueError as error:
                raise _damaged(place) from error


def _same_shapes(like: Any, saved: Any, place: Path) -> None:
    wanted = {jax.tree_util.keystr(p): x.shape for p, x in jax.tree.leaves_with_path(like)}
    found = {jax.tree_util.keystr(p): x.shape for p, x in jax.tree.leaves_with_path(saved)}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise UserError(
                f"{place} is a checkpoint of another model: parameter {name} has shape "
                f"{found.get(name, 'none')} there and {wanted.get(name, 'none')} here; use the "
                "model settings that it was trained with."
            )
