r"""Rows of a comparison as a table, JSON and a plot, and the command that serves the winner.

Run     .venv/bin/python experiments/tuning/comparison_table.py runs/tuning/trec

writes them anew with what lies in FOLDER/gguf by now: files (LABEL.gguf) and their speeds
(LABEL.speed.json of llama_cpp_speed.py). How large and how fast a file is depends on its type, not
on its weights, so a row without a file of its own takes the figures of another one of its type.
Where a sweep was run with --arg export=False, the files of the base are enough, made anywhere:

        ./launch.sh export runs/gemma runs/tuning/trec/gguf/base.gguf --format gguf --dtype bf16
        ./launch.sh export runs/gemma runs/tuning/trec/gguf/base_q4_0.gguf --format gguf \
            --dtype q4_0
"""

import argparse
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gemma_jax.files import read_json, write_bytes, write_json, write_text

_COLUMNS = (
    *("variant", "bound", "free", "JSON, free", "valid, free", "tuning, min"),
    *("step, GB", "file", "MB", "llama.cpp, tokens/s"),
)


def write(rows: Sequence[Mapping[str, Any]], folder: Path, primary: str, schema: Path) -> str:
    """Writes comparison.md, .json and .png into `folder` and returns what is to be printed."""
    rows = with_files(rows, folder / "gguf")
    table = markdown(rows, primary)
    write_json(folder / "comparison.json", {"primary": primary, "rows": list(rows)})
    write_text(folder / "comparison.md", table)
    write_bytes(folder / "comparison.png", plot(rows, primary, folder.name))
    best = winner(rows, primary)
    return f"{table}\n{folder}/comparison.md, .json, .png\n\n{serving(best, folder, schema)}"


def with_files(rows: Sequence[Mapping[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """Rows with `bytes` and `llama_cpp` (tokens/s) of the files in `folder`."""
    own = {row["label"]: _of_file(folder / f"{row['label']}.gguf") for row in rows}
    by_type: dict[str, dict[str, Any]] = {}
    for row in rows:
        for name, value in own[row["label"]].items():
            by_type.setdefault(row["dtype"], {}).setdefault(name, value)
    return [{**row, **by_type.get(row["dtype"], {}), **own[row["label"]]} for row in rows]


def _of_file(path: Path) -> dict[str, Any]:
    speed = path.with_suffix(".speed.json")
    known = json.loads(speed.read_text()) if speed.exists() else {}
    found = {"llama_cpp": known["tokens_per_s"], "bytes": known["bytes"]} if known else {}
    return found | ({"bytes": path.stat().st_size} if path.exists() else {})


def markdown(rows: Sequence[Mapping[str, Any]], primary: str) -> str:
    lines = [
        f"`{primary}` of {rows[0]['bound']['examples']} held-out replies, ± standard error.",
        "",
        f"| {' | '.join(_COLUMNS)} |",
        f"|{'---|' * len(_COLUMNS)}",
    ]
    for row in rows:
        free = row["free"]["metrics"]
        cells = [
            row["variant"] + (f", seed {row['seed']}" if row["seed"] else ""),
            _spell(row["bound"]["metrics"][primary]),
            *(_spell(free[name]) for name in (primary, "json", "valid")),
            _number(row.get("minutes"), ".1f"),
            _number(row.get("step_bytes"), ".1f", 1e9),
            row["dtype"],
            _number(row.get("bytes"), ".0f", 1e6),
            _number(row.get("llama_cpp"), ".0f"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def winner(rows: Sequence[Mapping[str, Any]], primary: str) -> Mapping[str, Any]:
    """The best in four bits if that is within two standard errors of the best; bound replies."""

    def score(row: Mapping[str, Any]) -> Mapping[str, Any]:
        return row["bound"]["metrics"][primary]

    best = max(rows, key=lambda row: score(row)["value"])
    least = score(best)["value"] - 2 * (score(best)["stderr"] or 0)
    near = [row for row in rows if score(row)["value"] >= least]
    return min(near, key=lambda row: (row["dtype"] != "q4_0", -score(row)["value"]))


def serving(row: Mapping[str, Any], folder: Path, schema: Path) -> str:
    name = row["variant"]
    dtype = row["dtype"]
    return (
        f"{name} is the smallest within two standard errors of the best. It is served by\n"
        f"  ./launch.sh export {row['folder']} {folder.name}.gguf --format gguf --dtype {dtype}\n"
        f"  llama-server -m {folder.name}.gguf --jinja --temp 0 --json-schema-file {schema}"
    )


def plot(rows: Sequence[Mapping[str, Any]], primary: str, title: str) -> bytes:
    """The primary metric of bound replies against the file's size and the minutes of tuning."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    names = list(dict.fromkeys(row["variant"] for row in rows))
    for axes, (label, key, unit) in zip(
        panels, (("MB of the file", "bytes", 1e6), ("minutes of tuning", "minutes", 1)), strict=True
    ):
        for row in rows:
            found = row["bound"]["metrics"][primary]
            colour = f"C{names.index(row['variant'])}"
            if (x := row.get(key, 0 if key == "minutes" else None)) is None:
                continue
            x /= unit
            axes.errorbar(x, found["value"], yerr=found["stderr"] or 0, fmt="o", color=colour)
            place = {"xytext": (5, 5), "textcoords": "offset points", "fontsize": 8}
            axes.annotate(row["variant"], (x, found["value"]), **place)
        axes.set_xlabel(label)
        axes.margins(x=0.2)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel(f"{primary}, bound to the schema")
    figure.suptitle(title)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150)
    return image.getvalue()


def _spell(found: Mapping[str, Any]) -> str:
    error = "" if found["stderr"] is None else f" ± {found['stderr']:.3f}"
    return f"{found['value']:.3f}{error}"


def _number(value: float | None, form: str, unit: float = 1) -> str:
    return "" if value is None else format(value / unit, form)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    known = read_json(folder / "comparison.json", "a comparison")
    print(write(known["rows"], folder, known["primary"], folder / "schema.json"))


if __name__ == "__main__":
    main()
