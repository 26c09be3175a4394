"""Checkpoints of a training run, with Orbax: asynchronous, atomic, restorable to any mesh.

One checkpoint holds `params` (and `ema`) apart from `progress` (step and optimizer state) and
`data` (the position of the batch stream, the same for all hosts, so that another number of them
can go on), and a reader of the weights touches nothing else.
"""

import contextlib
import re
from collections.abc import Iterator
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
            [
                checkpoint_managers.LatestN(keep_last),
                checkpoint_managers.BestN(
                    get_metric_fn=lambda metrics: -metrics[BEST_METRIC],
                    n=keep_best,
                    keep_checkpoints_without_metrics=False,
                ),
            ]
        )
        self._folder = folder / FOLDER
        with disk_errors(self._folder):
            self._manager = ocp.CheckpointManager(
                self._folder.absolute(),
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=policies,
                    # Without it metrics are not written, and the best is forgotten at a restart.
                    best_fn=lambda metrics: -metrics[BEST_METRIC],
                    cleanup_tmp_directories=True,
                ),
            )

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """The step of the best checkpoint by validation, None where none was measured."""
        return self._manager.best_step()

    def save(
        self, state: TrainState, batches: grain.DatasetIterator, metrics: dict[str, float] | None
    ) -> None:
        """Starts to write; the arrays are copied off the device before this returns."""
        items: dict[str, Any] = {
            "params": ocp.args.StandardSave(state.params),
            "progress": ocp.args.StandardSave({"step": state.step, "opt_state": state.opt_state}),
            "data": ocp.args.JsonSave(batches.get_state()),
        }
        if state.ema is not None:
            items["ema"] = ocp.args.StandardSave(state.ema)
        best = metrics if metrics and BEST_METRIC in metrics else None
        with _write_errors(self._folder):
            self._manager.save(int(state.step), args=ocp.args.Composite(**items), metrics=best)

    def restore(self, step: int, like: TrainState, batches: grain.DatasetIterator) -> TrainState:
        """The state at `step`, laid out as `like` (shapes, shardings); moves `batches` there."""
        items: dict[str, Any] = {
            "params": ocp.args.StandardRestore(like.params),
            "progress": ocp.args.StandardRestore({"step": like.step, "opt_state": like.opt_state}),
            "data": ocp.args.JsonRestore(),
        }
        if like.ema is not None:
            items["ema"] = ocp.args.StandardRestore(like.ema)
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:  # Orbax wraps what TensorStore says of damage in a bare one
            place = self._folder / str(step)
            raise UserError(
                f"the checkpoint {place} is damaged; copy it again, or delete that folder to go on "
                "from the one before."
            ) from error
        batches.set_state(restored["data"])
        progress = restored["progress"]
        return TrainState(
            progress["step"], restored["params"], progress["opt_state"], restored.get("ema")
        )

    def wait(self) -> None:
        """Returns when everything that was saved is on disk."""
        with _write_errors(self._folder):
            self._manager.wait_until_finished()

    def close(self) -> None:
        with _write_errors(self._folder):
            self._manager.close()


@contextlib.contextmanager
def _write_errors(folder: Path) -> Iterator[None]:
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
    steps = checkpoint_steps(folder)
    if not steps:
        raise UserError(
            f"{folder} holds no checkpoint; give the folder of a run that has saved one."
        )
    if step is not None and step not in steps:
        raise UserError(f"{folder} has no checkpoint of step {step}; it has {steps}.")
    place = Path(folder).absolute() / FOLDER / str(step or steps[-1])
    item = place / ("ema" if (place / "ema").exists() else "params")
    try:
        with ocp.StandardCheckpointer() as reader:
            saved = reader.metadata(item).item_metadata
            if saved is None:
                raise ValueError("its weights cannot be read")
            _same_shapes(like, saved.tree, place)
            return reader.restore(item, like)
    except UserError:
        raise
    except Exception as error:  # as above
        raise UserError(
            f"the checkpoint {place} is damaged; copy it again, or give another one of the run, "
            f"which has {steps}."
        ) from error


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
