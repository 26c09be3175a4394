"""Metrics of a run: JSON lines and TensorBoard always, Weights & Biases on request."""

import json
import statistics
import uuid
from pathlib import Path
from typing import Any

import jax
from tensorboardX import SummaryWriter

from gemma_jax.errors import UserError
from gemma_jax.files import (
    Lines,
    disk_errors,
    patiently,
    read_json,
    read_json_lines,
    write_json,
)

FILE = "metrics.jsonl"

# Dense bf16 FLOP/s of one device, from the vendors' data sheets. The key is a part of
# `device_kind` in lower case; the first that matches counts.
PEAK_FLOPS = {
    "h200": 989e12,
    "h100": 989e12,
    "a100": 312e12,
    "v6 lite": 918e12,
    "v6e": 918e12,
    "v5 lite": 197e12,
    "v5e": 197e12,
    "v5p": 459e12,
    "v5": 459e12,
    "v4": 275e12,
}


def peak_flops(device: Any = None) -> float | None:
    """bf16 FLOP/s of one device, None where it is not in the table (every CPU)."""
    device = jax.devices()[0] if device is None else device
    name = device.device_kind.lower()
    return next((flops for key, flops in PEAK_FLOPS.items() if key in name), None)


def read_metrics(folder: str | Path) -> list[dict[str, float]]:
    """The records of a run, in order; a line cut off by a crash is left out."""
    return [one for one in read_json_lines(Path(folder) / FILE) if "step" in one]


def median(records: list[dict[str, float]], name: str) -> float | None:
    values = [record[name] for record in records if record.get(name) is not None]
    return statistics.median(values) if values else None


def summary(records: list[dict[str, float]]) -> dict[str, float]:
    """The last value of each metric; speeds as the median over the run."""
    last: dict[str, float] = {}
    for record in records:
        last |= record
    for name in ("tokens_per_s", "mfu", "data_wait"):
        value = median(records, name)
        if value is not None:
            last[name] = value
    return last


class MetricsLog:
    """Appends records to a run folder. Records after `start_step` are dropped when it opens: the
    steps behind them will be done again. Of several hosts the first alone writes."""

    def __init__(
        self,
        folder: Path,
        start_step: int,
        wandb_project: str | None,
        name: str,
        settings: Any = None,
    ) -> None:
        self._writes = jax.process_index() == 0
        if not self._writes:
            return
        self._wandb = None
        if wandb_project:
            self._wandb = _start_wandb(wandb_project, name, folder, settings)
        kept = [record for record in read_metrics(folder) if record["step"] <= start_step]
        self._lines = Lines(folder / FILE, "".join(json.dumps(x) + "\n" for x in kept))
        self._folder = folder / "tensorboard"
        self._open_board(start_step + 1)

    def write(self, step: int, values: dict[str, float | None]) -> None:
        if not self._writes:
            return
        self._lines.add(json.dumps({"step": step, **values}) + "\n")
        if not self._board_lives():
            self._open_board(step)
        for name, value in values.items():
            if value is not None:
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def sync(self) -> None:
        """Returns when the lines are on disk."""
        if self._writes:
            self._lines.sync()

    def close(self) -> None:
        if not self._writes:
            return
        if self._board_lives():
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _open_board(self, step: int) -> None:
        with disk_errors(self._folder):
            self._board = patiently(
                lambda: SummaryWriter(str(self._folder), purge_step=step, flush_secs=20),
                self._folder,
            )

    def _board_lives(self) -> bool:
        """Whether TensorBoard's thread does: an error of the disk ends it, and then each call would
        wait for it without end."""
        writer = self._board.file_writer
        return writer is None or writer.event_writer._worker.is_alive()


def _start_wandb(project: str, name: str, folder: Path, settings: Any) -> Any:
    """A W&B run that belongs to the run folder: a resumed run goes on in it."""
    try:
        import wandb
    except ImportError:
        raise UserError(
            f"train.wandb_project={project!r} needs Weights & Biases: start with "
            "`GEMMA_JAX_EXTRA=cpu,wandb ./launch.sh ...` (cuda or tpu for cpu where it is one), or "
            "leave the setting out."
        ) from None
    id_file = folder / "wandb.json"
    if not id_file.exists():
        write_json(id_file, {"id": uuid.uuid4().hex[:12]})
    own = read_json(id_file, "the name of a run at Weights & Biases").get("id")
    try:
        return wandb.init(project=project, name=name, id=own, resume="allow", config=settings)
    except Exception as error:  # of many kinds: no login, no network, no such project
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"Weights & Biases refuses train.wandb_project={project!r} ({cause.rstrip('.')}); log "
            "in with `wandb login`, set WANDB_MODE=offline, or leave the setting out."
        ) from error
