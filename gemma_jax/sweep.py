"""Sweeps: named points or a grid over an experiment, seeds paired, finished points skipped."""

import csv
import dataclasses
import io
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from gemma_jax.distill.objective import Distill
from gemma_jax.errors import UserError
from gemma_jax.experiment import Experiment, TeacherRun, finished_result, run
from gemma_jax.files import write_bytes, write_text
from gemma_jax.model.cache import cache_bytes
from gemma_jax.model.config import count_parameters
from gemma_jax.runs import RUNS
from gemma_jax.settings import override, to_json
from gemma_jax.training.metrics import read_metrics

type Row = dict[str, Any]
type Finished = tuple[str, Experiment, dict[str, Any]]
_MAX_NAME = 200  # bytes; most file systems take 255 for a folder's name
_COLUMNS = (
    *("point", "seed", "bits_per_byte", "loss", "accuracy", "tokens", "tokens_per_s", "wall_s"),
    *("parameters", "embedding_parameters", "kv_cache_bytes"),
)


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Points are changes to `base` by dotted path. Every point runs with every seed.

    The first point is the one that the others are compared with. Run folders are
    `runs/BASE/POINT/seedN`; the tables and the plot lie in `runs/BASE`.
    """

    base: Experiment
    points: Mapping[str, Mapping[str, Any]]
    seeds: Sequence[int] = (0,)

    def __post_init__(self) -> None:
        if not self.points or not self.seeds:
            raise UserError("a sweep needs at least one point and one seed.")
        if len(set(self.seeds)) != len(self.seeds):
            raise UserError(f"seeds={list(self.seeds)} name a seed twice.")
        for point in self.points:
            if len(point.encode()) > _MAX_NAME or Path(point).name != point:
                raise UserError(
                    f"the point '{point}' cannot name a folder; give it a short name without "
                    "slashes, as points(BASE, NAME=...)."
                )
        seen: dict[str, str] = {}
        for point in self.points:
            settings = str(to_json(dataclasses.replace(self.experiment(point, 0), name="any")))
            if fixed := {"name", "seed"} & self.points[point].keys():
                raise UserError(
                    f"point '{point}' sets {min(fixed)}, which the sweep sets itself: seeds are "
                    "given as seeds=(0, 1, 2), and the name follows from the point."
                )
            if settings in seen:
                raise UserError(f"points '{seen[settings]}' and '{point}' are equal; drop one.")
            seen[settings] = point

    @property
    def folder(self) -> Path:
        return RUNS / self.base.name

    def experiment(self, point: str, seed: int) -> Experiment:
        changed = override(self.base, self.points[point])
        name = f"{self.base.name}/{point}/seed{seed}"
        return dataclasses.replace(changed, name=name, seed=seed)


def points(base: Experiment, *, seeds: Sequence[int] = (0,), **named: Mapping[str, Any]) -> Sweep:
    """`points(BASE, local={"model.attn_pattern": "L"}, five_to_one={})`."""
    return Sweep(base, named, seeds)


def grid(
    base: Experiment, axes: Mapping[str, Sequence[Any]], *, seeds: Sequence[int] = (0,)
) -> Sweep:
    """Every combination: `grid(BASE, {"model.sliding_window": [128, 256], "seq_len": [512]})`."""
    named: dict[str, Mapping[str, Any]] = {}
    for choice in itertools.product(*(enumerate(values) for values in axes.values())):
        changes = {path: value for path, (_, value) in zip(axes, choice, strict=True)}
        parts = [
            f"{path.rsplit('.', 1)[-1]}={_spelled(value, place, axes[path])}"
            for path, (place, value) in zip(axes, choice, strict=True)
        ]
        name = ",".join(parts).replace("/", "_")
        if name in named:
            raise UserError(
                f"two points of the grid would both be called '{name}'; name them with points(...)."
            )
        named[name] = changes
    return Sweep(base, named, seeds)


def _spelled(value: Any, place: int, values: Sequence[Any]) -> str:
    """A value in the name of a point, which is a folder: settings by their class, with their place
    among the values where others are of the same class."""
    if not dataclasses.is_dataclass(value):
        return str(value)
    name = type(value).__name__
    alone = sum(type(other) is type(value) for other in values) == 1
    return name if alone else f"{name}{place}"


def run_sweep(sweep: Sweep, only: Sequence[str] = ()) -> list[Row]:
    """Runs what is not finished, and writes results.csv, results.md and results.png after each.

    Returns a row for each finished run, as in the tables: of other seeds too, if they were run
    with the same settings. With `only`, the sweep is shared among several jobs: those points alone
    are run, and the tables are left to `tabulate`.
    """
    if unknown := [point for point in only if point not in sweep.points]:
        known = ", ".join(sweep.points)
        raise UserError(f"there is no point '{unknown[0]}'; there are: {known}.")
    rows = []
    for seed, point in itertools.product(sweep.seeds, only or sweep.points):
        run(sweep.experiment(point, seed))
        rows = [row for row in _rows(sweep) if row["point"] in only] if only else tabulate(sweep)
    return rows


def tabulate(sweep: Sweep) -> list[Row]:
    """Writes results.csv, results.md and results.png of what is finished, and returns the rows."""
    rows = _rows(sweep)
    if jax.process_index() == 0:
        _write(sweep, rows, finished_runs(sweep))
    return rows


def _rows(sweep: Sweep) -> list[Row]:
    finished = finished_runs(sweep)
    return [_row(one, result, name) for name, one, result in finished] + teacher_rows(sweep)


def finished_runs(sweep: Sweep) -> list[Finished]:
    """(point, experiment, result) of each run that is finished, point by point."""
    found = []
    names = [path.name for point in sweep.points for path in (sweep.folder / point).glob("seed*")]
    seeds = {int(name[4:]) for name in names if name[4:].isdecimal()}
    for point, seed in itertools.product(sweep.points, sorted(seeds)):
        experiment = sweep.experiment(point, seed)
        result = finished_result(experiment)
        if result is not None:
            found.append((point, experiment, result))
    return found


def teacher_rows(sweep: Sweep) -> list[Row]:
    """A row for each teacher that the sweep has trained."""
    rows = {}
    for point in sweep.points:
        teacher = _teacher(sweep.experiment(point, sweep.seeds[0]))
        if teacher is not None and (result := finished_result(teacher)) is not None:
            path = Path(teacher.name)
            inside = path.is_relative_to(sweep.base.name)
            name = str(path.relative_to(sweep.base.name)) if inside else teacher.name
            # A point of that name is a row of its own.
            name = teacher.name if name in sweep.points else name
            rows[teacher.name] = _row(teacher, result, name)
    return list(rows.values())


def _teacher(experiment: Experiment) -> Experiment | None:
    """The teacher that an experiment describes."""
    objective = experiment.objective
    if isinstance(objective, Distill) and isinstance(objective.shards, TeacherRun):
        teacher = objective.shards.teacher
        return teacher if isinstance(teacher, Experiment) else None
    return None


def _row(experiment: Experiment, result: Mapping[str, Any], point: str) -> Row:
    count = count_parameters(experiment.model)
    return {
        **{name: result.get(name) for name in _COLUMNS},
        "point": point,
        "seed": experiment.seed,
        "parameters": count.total,
        "embedding_parameters": count.embedding,
        "kv_cache_bytes": sum(cache_bytes(experiment.model, experiment.seq_len)),
    }


def _write(sweep: Sweep, rows: list[Row], finished: list[Finished]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS)
    writer.writeheader()
    writer.writerows(rows)
    write_text(sweep.folder / "results.csv", text.getvalue())
    write_text(sweep.folder / "results.md", markdown(rows))
    write_bytes(sweep.folder / "results.png", _plot(sweep, finished))


def markdown(rows: list[Row]) -> str:
    """A table with a line for each point: mean and standard deviation over seeds, and the paired
    difference from the first point with its standard error, over the seeds that both have."""
    lines = [
        "| point | seeds | bits/byte | against first | loss | accuracy | tokens/s | parameters |",
        "|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["point"], []).append(row)
    first = {row["seed"]: row["bits_per_byte"] for row in next(iter(groups.values()), [])}
    for place, (point, group) in enumerate(groups.items()):
        paired = [
            row["bits_per_byte"] - first[row["seed"]] for row in group if row["seed"] in first
        ]
        against = _spread(paired, error=True) if place and paired else ""
        if against and len(paired) < len(first):
            against += f" ({len(paired)} of {len(first)} seeds)"
        rates = [row["tokens_per_s"] for row in group if row["tokens_per_s"]]
        lines.append(
            f"| {point} | {len(group)} | {_spread([r['bits_per_byte'] for r in group])} "
            f"| {against} "
            f"| {statistics.mean(r['loss'] for r in group):.4f} "
            f"| {statistics.mean(r['accuracy'] for r in group):.4f} "
            f"| {statistics.mean(rates) if rates else 0:,.0f} | {group[0]['parameters']:,} |"
        )
    return "\n".join(lines) + "\n"


def _spread(values: list[float], *, error: bool = False) -> str:
    """Mean ± standard deviation, or ± standard error; signed where it is a difference."""
    mean = statistics.mean(values)
    text = f"{mean:+.4f}" if error else f"{mean:.4f}"
    if len(values) == 1:
        return text
    deviation = statistics.stdev(values) / (math.sqrt(len(values)) if error else 1)
    return f"{text} ± {deviation:.4f}"


def _plot(sweep: Sweep, finished: list[Finished]) -> bytes:
    """Validation bits/byte over training tokens, a colour a point, a line a seed; the legend has
    each point's last value, the mean over its seeds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    low, high = math.inf, -math.inf
    for colour, point in enumerate(sweep.points):
        runs = [(one, result) for name, one, result in finished if name == point]
        mean = statistics.mean([result["bits_per_byte"] for _, result in runs] or [math.nan])
        label = f"{point}: {mean:.3f}" + (f", {len(runs)} seeds" if len(runs) > 1 else "")
        for experiment, _ in runs:
            records = [r for r in read_metrics(experiment.folder) if "valid/bits_per_byte" in r]
            if not records:
                continue
            x = [record["step"] * experiment.batch_tokens for record in records]
            y = [record["valid/bits_per_byte"] for record in records]
            axes.plot(x, y, color=f"C{colour}", marker="o", markersize=3, alpha=0.7, label=label)
            label = ""  # one entry a point
            low, high = min(low, *y), max(high, *y[len(y) // 4 :])
    for row in teacher_rows(sweep):
        value = row["bits_per_byte"]
        axes.axhline(value, color="0.4", linestyle="--", label=f"{row['point']}: {value:.3f}")
        low = min(low, value)
    if math.isfinite(high):
        margin = 0.05 * max(high - low, 0.01)
        axes.set_ylim(low - margin, high + margin)
        axes.legend(frameon=False)
    axes.set(
        title=f"{sweep.base.name}: held-out text (a line a seed)",
        xlabel="training tokens",
        ylabel="bits per byte",
    )
    axes.xaxis.set_major_formatter(FuncFormatter(_tokens_label))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150)
    return image.getvalue()


def _tokens_label(value: float, _: int | None = None) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"
