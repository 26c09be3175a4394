"""The same measurement at several values of one option, and its plot.

Each point is a process of its own: the most memory that a process has held cannot be forgotten,
and what one point has compiled or tuned would speed up the next.
"""

import argparse
import copy
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from gemma_jax.errors import UserError
from gemma_jax.files import write_bytes

_NAMES = ("seq_len", "batch", "batch_tokens", "window", "documents", "microbatches")
_SIZES = ("batch", "batch_tokens")
_OWN = ("verb", "what", "json", "sweep", "plot")  # what a point does not take over
_LABELS = {"seq_len": "tokens a sequence", "batch": "sequences a batch"}


def name(arguments: argparse.Namespace) -> str:
    return arguments.sweep.partition("=")[0]


def points(arguments: argparse.Namespace) -> dict[int, argparse.Namespace]:
    """The arguments of each point by its value."""
    option, _, values = arguments.sweep.partition("=")
    if option not in _NAMES:
        raise UserError(
            f"--sweep '{option}' is none of what it can go over: {', '.join(_NAMES)}; write "
            "seq_len=512,1024."
        )
    try:
        numbers = [int(value) for value in values.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1 or len(set(numbers)) < len(numbers):
        raise UserError(
            f"--sweep {option}='{values}' must be different whole numbers from 1 on, with commas, "
            "such as 512,1024."
        )
    found = {}
    for number in numbers:
        changed = copy.copy(arguments)
        if option in _SIZES:  # one of them says it all
            changed.batch = changed.batch_tokens = None
        setattr(changed, option, number)
        found[number] = changed
    return found


def run_points(
    arguments: argparse.Namespace, points: dict[int, argparse.Namespace], plot: Path
) -> dict[str, Any]:
    """{"what", "sweep", "points": [{"value", and `result` or `error`}], "plot"}; the plot is
    written. A point that fails (by its memory, say) is told and the others go on."""
    found: list[dict[str, Any]] = []
    for number, changed in points.items():
        print(f"bench: {name(arguments)} = {number}", file=sys.stderr, flush=True)
        found.append({"value": number, **_run(command(changed))})
    if all("error" in point for point in found):
        raise UserError(f"no point of the sweep could be measured: {found[0]['error']}")
    value = {"what": arguments.what, "sweep": name(arguments), "points": found}
    write_bytes(plot, draw(value))
    return {**value, "plot": str(plot)}


def command(arguments: argparse.Namespace) -> list[str]:
    """The command line of one point."""
    line = [sys.executable, "-m", "gemma_jax", "bench", arguments.what, "--json"]
    for option, value in vars(arguments).items():
        if option in _OWN or value is None:
            continue
        for one in value if isinstance(value, list) else [value]:
            line.append(f"--{option.replace('_', '-')}={one}")
    return line


def _run(line: list[str]) -> dict[str, Any]:
    package = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        line, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}
    )
    if done.returncode == 0:
        return {"result": json.loads(done.stdout)}
    said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    return {"error": said[-1].removeprefix("error: ")}


def draw(value: dict[str, Any]) -> bytes:
    """A PNG of tokens a second over the swept option: a line a library and kind of row, with the
    range over repeats."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullLocator

    lines: dict[str, list[tuple[int, dict[str, float]]]] = {}
    device = ""
    for point in value["points"]:
        if (result := point.get("result")) is None:
            continue
        device = result["device"]
        for source in (result, *result["peers"]):
            for row in source["rows"]:
                label = source["name"]
                if len({row["what"] for row in source["rows"]}) > 1:
                    label += f", {row['what']}"
                if value["sweep"] != "batch" and len({r["batch"] for r in source["rows"]}) > 1:
                    label += f", batch {row['batch']}"
                lines.setdefault(label, []).append((point["value"], row["tokens_per_s"]))
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for label, measured in lines.items():
        x = [at for at, _ in measured]
        y = [rate["median"] for _, rate in measured]
        below = [rate["median"] - rate["min"] for _, rate in measured]
        above = [rate["max"] - rate["median"] for _, rate in measured]
        axes.errorbar(x, y, yerr=(below, above), marker="o", markersize=4, capsize=3, label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({at for measured in lines.values() for at, _ in measured}))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda at, _: f"{at:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:,.0f}"))
    axes.set_ylim(bottom=0)
    axes.set(
        title=f"bench {value['what']} on {device} (median, range over repeats)",
        xlabel=_LABELS.get(value["sweep"], value["sweep"].replace("_", " ")),
        ylabel="tokens a second",
    )
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150)
    return image.getvalue()
