"""Checkpoints of a training run, with Orbax: asynchronous, atomic, restorable to any mesh.

One checkpoint holds `params` (and `ema`) apart from `progress` (step and optimizer state) and
`data` (the position of the batch stream, the same for all hosts, so that another number of them
can go on), and a reader of the weights touches nothing else. `check` says whose it is, and has a
fingerprint of each array, by which a changed byte is noticed. `restore.py` goes on from one.
"""

import contextlib
import gc
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from gemma_jax.buckets import absolute, is_remote, place
from gemma_jax.errors import UserError
from gemma_jax.files import disk_errors, error_number, patiently, read_json, write_json
from gemma_jax.hosts import is_first
from gemma_jax.training.bad_steps import watch_to_json
from gemma_jax.training.fingerprint import fingerprints
from gemma_jax.training.retention import Before, Best, score
from gemma_jax.training.step import TrainState

FOLDER, ELSEWHERE = "checkpoints", "checkpoints.json"
_COMMITTED = "commit_success.txt"  # Orbax writes it last in a bucket, where it cannot rename


def checkpoints_of(folder: str | Path) -> Path:
    """Where a run folder's checkpoints are: in it, or where it says."""
    told, here = Path(folder) / ELSEWHERE, Path(folder) / FOLDER
    if not told.exists():
        if here.is_symlink() and not here.exists():
            raise UserError(
                f"{here} is a link to {here.readlink()}, which is not there; bring that back, or "
                "remove the link to begin anew."
            )
        return here
    there = read_json(told, "the place of a run's checkpoints").get("checkpoints")
    if not isinstance(there, str) or not there:
        raise UserError(
            f"{told} does not say where the checkpoints are; copy it again, or remove it if they "
            f"are in {here}."
        )
    return place(there)


def keep_elsewhere(folder: Path, root: str | None, name: str) -> None:
    """Notes that the checkpoints of a run are kept in a folder of the run's name under `root`."""
    there = None if root is None else str(place(root) / name)
    now = checkpoints_of(folder)
    if there == (str(now) if (folder / ELSEWHERE).exists() else None):
        return
    if checkpoint_steps(folder):
        raise UserError(
            f"{folder} has checkpoints in {now}, and train.checkpoints={root!r} says otherwise; "
            "leave it as it was."
        )
    if is_first() and there is not None:
        write_json(folder / ELSEWHERE, {"checkpoints": there})
    elif is_first():
        (folder / ELSEWHERE).unlink()


class Checkpoints:
    """The checkpoints of a run folder: the last `keep_last`, and the `keep_best` of validation.

    And the last before each of `bad_steps()`. Every one says of which `settings` (JSON) its run is,
    so that those of another are known.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep_last: int = 2,
        keep_best: int = 1,
        settings: Any = None,
        bad_steps: Callable[[], Sequence[int]] = tuple,
    ) -> None:
        policies = checkpoint_managers.AnyPreservationPolicy(
            [checkpoint_managers.LatestN(keep_last), Best(keep_best), Before(bad_steps)]
        )
        self._folder, self._settings = checkpoints_of(folder), settings
        self._options = ocp.CheckpointManagerOptions(
            preservation_policy=policies,
            # Without it metrics are not written, and the best is forgotten at a restart.
            best_fn=lambda metrics: -score(metrics),
            cleanup_tmp_directories=True,
        )
        self._unsure: Callable[[], None] | None = None  # saves again what may not be on disk
        with disk_errors(self._folder):
            patiently(self._open, self._folder)

    def _open(self) -> None:
        self._manager = ocp.CheckpointManager(absolute(self._folder), options=self._options)

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """The step of the best checkpoint by validation, None where none was measured."""
        return self._manager.best_step()

    def save(self, state: TrainState, position: Any, metrics: dict[str, float]) -> None:
        """Starts to write; the arrays are copied off the device before this returns. `position` is
        the place in the stream of batches."""
        items: dict[str, Any] = {
            "params": ocp.args.StandardSave(state.params),
            "progress": ocp.args.StandardSave({"step": state.step, "opt_state": state.opt_state}),
            "data": ocp.args.JsonSave(position),
            "check": ocp.args.JsonSave(
                {"settings": self._settings, "fingerprints": fingerprints(checked(state))}
            ),
        }
        if state.ema is not None:
            items["ema"] = ocp.args.StandardSave(state.ema)
        if state.watch is not None:
            items["watch"] = ocp.args.JsonSave(watch_to_json(state.watch))
        step, args = int(state.step), ocp.args.Composite(**items)

        def save() -> None:
            self._manager.save(step, args=args, metrics=metrics)

        self._patiently(save)
        self._unsure = save

    def wait(self) -> None:
        """Returns when everything that was saved is on disk. The state that was saved last must
        still be there: it may have to be written again."""

        def write_again() -> None:
            self._open_again()
            if self._unsure is not None:
                self._unsure()

        self._patiently(lambda: self._manager.wait_until_finished(), write_again)
        self._unsure = None

    def close(self) -> None:
        with write_errors(self._folder):
            self._manager.close()

    def _patiently(
        self, work: Callable[[], None], before_again: Callable[[], None] | None = None
    ) -> None:
        """A write that failed in the background is told at the next call, which then writes what is
        newer; the manager believes in it, so another one takes its place. Of several processes
        each would have to begin again: they end with a sentence."""
        with write_errors(self._folder):
            if jax.process_count() > 1:
                work()
                return
            patiently(work, self._folder, before_again=before_again or self._open_again)

    def _open_again(self) -> None:
        with contextlib.suppress(Exception):  # what it could not write it tells once more
            self._manager.close()
        self._open()


@contextlib.contextmanager
def write_errors(folder: Path) -> Iterator[None]:
    """`disk_errors`, also where TensorStore hands on the disk's error in the text of its own."""
    with disk_errors(folder):
        try:
            yield
        except ValueError as error:
            number = None if isinstance(error, UserError) else error_number(error)
            if number is None:
                raise
            raise OSError(number, str(error)) from error


def checkpoint_steps(folder: str | Path) -> list[int]:
    """The steps for which a run folder holds a whole checkpoint, in order."""
    root = checkpoints_of(folder)
    found = [path for path in root.glob("*") if path.name.isdigit()]
    if is_remote(root):
        found = [path for path in found if (path / _COMMITTED).exists()]
    return sorted(int(path.name) for path in found)


def load_params(folder: str | Path, like: Any, step: int | None = None) -> Any:
    """The weights of a run folder: of `step`, or of its last checkpoint; the average where kept.

    `like` is the tree of shapes (with shardings where wanted) of the model they should fit.
    """
    item = weights_folder(folder, step)
    place, steps = item.parent, checkpoint_steps(folder)
    try:
        if difference := other_model(place, item.name, like):
            raise UserError(f"{place} {difference}; use the settings that it was trained with.")
        params = read_item(place, item.name, like)
        check_values(place, {item.name: params})
        gc.collect()  # Orbax leaves what it has read in reference cycles, as large as the model
        return params
    except UserError:
        raise
    except Exception as error:  # Orbax wraps what TensorStore says of damage in a bare one
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
    place = checkpoints_of(folder) / str(steps[-1] if step is None else step)
    return place / ("ema" if (place / "ema").exists() else "params")


def read_item(place: Path, name: str, like: Any) -> Any:
    """A tree of a checkpoint, laid out as `like`. Each process reads its own part, and waits for no
    other, so that one that cannot may say so."""
    with contextlib.closing(ocp.StandardCheckpointHandler()) as reader:
        return reader.restore(absolute(place) / name, args=ocp.args.StandardRestore(like))


def other_model(place: Path, name: str, like: Any) -> str | None:
    """How a tree of a checkpoint differs from `like`; None where its shapes are the same."""
    # The handler alone: a `Checkpointer` would ask this item for what its checkpoint has, and warn.
    with contextlib.closing(ocp.StandardCheckpointHandler()) as reader:
        saved = reader.metadata(absolute(place) / name)
    if saved is None:
        raise ValueError("its weights cannot be read")
    wanted, found = _shapes(like), _shapes(saved.tree)
    for path in sorted(wanted.keys() | found.keys()):
        if wanted.get(path) != found.get(path):
            there, here = found.get(path, "none"), wanted.get(path, "none")
            return (
                f"is a checkpoint of another model: parameter {path} has shape {there} there and "
                f"{here} here"
            )
    return None


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {jax.tree_util.keystr(path): x.shape for path, x in jax.tree.leaves_with_path(tree)}


def checked(state: TrainState) -> dict[str, Any]:
    """The parts of a state that a checkpoint has fingerprints of, by their names there."""
    return {"params": state.params, "opt_state": state.opt_state, "ema": state.ema}


def check_values(place: Path, parts: dict[str, Any]) -> None:
    """Compares arrays with what was written; all processes must call it together."""
    saved = saved_json(place, "check").get("fingerprints")
    if saved is None:
        return
    for path, found in fingerprints(parts).items():
        if saved.get(path) != found:
            raise ValueError(f"{path} is not what was written")


def saved_json(place: Path, name: str) -> dict[str, Any]:
    """A JSON item of a checkpoint; nothing where it has none."""
    path = place / name / "metadata"
    try:
        value = json.loads(path.read_text()) if path.exists() else {}
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"its {name} cannot be read")
    return value


def check_metrics(place: Path) -> None:
    """Orbax reads the metrics of every checkpoint when it opens the folder."""
    with contextlib.suppress(FileNotFoundError):
        try:
            json.loads((place / "metrics" / "metrics").read_text())
        except ValueError:
            raise ValueError("its metrics cannot be read") from None
