"""Sweeps: what is refused, what is written, and the arithmetic of the table."""

import csv
import dataclasses
import re
import statistics
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes

from gemma_jax import sweep as sweeps
from gemma_jax.claims import claim
from gemma_jax.distill.objective import Distill
from gemma_jax.errors import UserError
from gemma_jax.experiment import Experiment, TeacherRun
from gemma_jax.machines.results import collect
from gemma_jax.machines.shell import Shell
from gemma_jax.model.config import ModelConfig
from gemma_jax.runs import RUNS, write_result
from gemma_jax.settings import to_json
from gemma_jax.sweep import Row, grid, markdown, points, run_sweep, tabulate
from gemma_jax.training.objective import Xent


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Experiment:
    monkeypatch.chdir(tmp_path)
    model = ModelConfig(
        vocab_size=400,
        embed_dim=16,
        mlp_dim=32,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        max_seq_len=64,
        attn_pattern="LG",
        sliding_window=8,
    )
    return Experiment(
        name="base", model=model, data="data", tokens=2048, batch_tokens=256, seq_len=32
    )


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The experiments that were run, in order; each "trains" at once, to a score by its seed."""
    names: list[str] = []

    def run(experiment: Experiment) -> dict[str, Any]:
        names.append(experiment.name)
        score = 2.0 + experiment.seed + (0.25 if experiment.model.attn_pattern == "L" else 0.0)
        result = {
            "name": experiment.name,
            "bits_per_byte": score,
            "loss": 1.0,
            "accuracy": 0.5,
            "tokens": experiment.tokens,
            "tokens_per_s": 10.0,
            "wall_s": 1.0,
        }
        write_result(experiment.folder, result)
        return result

    monkeypatch.setattr(sweeps, "run", run)
    return names


RESULT = {"bits_per_byte": 1.0, "loss": 2.0, "accuracy": 0.5, "tokens": 32, "wall_s": 1.0}


def row(point: str, seed: int, bits: float, rate: float | None = 100.0) -> Row:
    return {
        "point": point,
        "seed": seed,
        "bits_per_byte": bits,
        "loss": bits,
        "accuracy": 0.5,
        "tokens_per_s": rate,
        "parameters": 1234,
    }


def cells(table: str) -> dict[str, list[str]]:
    lines = [line.strip("| ").split("|") for line in table.splitlines()[2:]]
    return {line[0].strip(): [cell.strip() for cell in line[1:]] for line in lines}


def test_a_grid_has_every_combination(base: Experiment) -> None:
    sweep = grid(base, {"model.sliding_window": [4, 8], "seq_len": [16, 32]})
    assert list(sweep.points) == [
        "sliding_window=4,seq_len=16",
        "sliding_window=4,seq_len=32",
        "sliding_window=8,seq_len=16",
        "sliding_window=8,seq_len=32",
    ]
    one = sweep.experiment("sliding_window=4,seq_len=16", 3)
    assert (one.model.sliding_window, one.seq_len, one.seed) == (4, 16, 3)
    assert one.name == "base/sliding_window=4,seq_len=16/seed3"


def test_equal_points_are_refused(base: Experiment) -> None:
    with pytest.raises(UserError, match="'a' and 'b' are equal"):
        points(base, a={}, b={"model.attn_pattern": "LG"})


def test_a_point_with_an_unknown_setting_is_refused(base: Experiment) -> None:
    with pytest.raises(UserError, match="no setting 'window'"):
        points(base, a={"model.window": 3})


@pytest.mark.parametrize("seeds", [(), (1, 1)])
def test_no_seed_or_one_twice_is_refused(base: Experiment, seeds: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match="seed"):
        points(base, seeds=seeds, a={})


def test_the_names_of_a_grid_are_short_and_none_comes_twice(base: Experiment) -> None:
    shards = TeacherRun(path="shards", teacher=base)
    taught = [Distill(shards=shards), Distill(shards=shards, hard_weight=0.5), Xent()]
    sweep = grid(base, {"objective": taught, "train.ema_decay": [None, 0.9]})
    assert list(sweep.points)[1] == "objective=Distill0,ema_decay=0.9"
    assert list(sweep.points)[4] == "objective=Xent,ema_decay=None"
    with pytest.raises(UserError, match="both be called 'data=a_b'"):
        grid(base, {"data": ["a/b", "a_b"]})
    with pytest.raises(UserError, match="cannot name a folder"):
        grid(base, {"data": ["a" * 300]})


def test_teachers_are_rows_of_their_own(base: Experiment, ran: list[str]) -> None:
    """One called like a point, and two of the same last name."""
    changes = {}
    for point, name in {"a": "base/a", "b": "base/teacher", "c": "x/teacher"}.items():
        teacher = dataclasses.replace(base, name=name)
        claim(teacher.folder, teacher)
        write_result(teacher.folder, RESULT)
        changes[point] = {"objective": Distill(shards=TeacherRun(path=point, teacher=teacher))}
    rows = run_sweep(points(base, **changes))
    assert [row["point"] for row in rows] == ["a", "b", "c", "base/a", "teacher", "x/teacher"]


def test_every_point_runs_with_every_seed(base: Experiment, ran: list[str]) -> None:
    sweep = points(base, seeds=(0, 1), a={}, b={"model.attn_pattern": "L"})
    rows = run_sweep(sweep)
    assert ran == ["base/a/seed0", "base/b/seed0", "base/a/seed1", "base/b/seed1"]
    with (sweep.folder / "results.csv").open() as file:
        written = list(csv.DictReader(file))
    assert [(r["point"], int(r["seed"]), float(r["bits_per_byte"])) for r in written] == [
        (r["point"], r["seed"], r["bits_per_byte"]) for r in rows
    ]
    assert int(written[0]["parameters"]) > int(written[0]["embedding_parameters"]) == 400 * 16
    table = (sweep.folder / "results.md").read_text()
    assert cells(table)["b"][:3] == ["2", "2.7500 ± 0.7071", "+0.2500 ± 0.0000"]
    assert (sweep.folder / "results.png").read_bytes().startswith(b"\x89PNG")


def test_tables_are_there_after_an_interruption(
    base: Experiment, ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = sweeps.run

    def interrupted(experiment: Experiment) -> dict[str, Any]:
        if "/b/" in experiment.name:
            raise KeyboardInterrupt
        return quick(experiment)

    monkeypatch.setattr(sweeps, "run", interrupted)
    sweep = points(base, a={}, b={"model.attn_pattern": "L"})
    with pytest.raises(KeyboardInterrupt):
        run_sweep(sweep)
    assert list(cells((sweep.folder / "results.md").read_text())) == ["a"]


def test_the_table_pairs_seeds() -> None:
    first, other = [2.0, 3.0, 4.0], [1.9, 2.7, 3.8]
    rows = [row("a", seed, bits) for seed, bits in enumerate(first)]
    rows += [row("b", seed, bits) for seed, bits in enumerate(other)]
    table = cells(markdown(rows))
    gaps = [b - a for a, b in zip(first, other, strict=True)]
    error = statistics.stdev(gaps) / 3**0.5
    assert table["a"][:3] == ["3", "3.0000 ± 1.0000", ""]
    assert table["b"][1] == f"{statistics.mean(other):.4f} ± {statistics.stdev(other):.4f}"
    assert table["b"][2] == f"{statistics.mean(gaps):+.4f} ± {error:.4f}"


def test_a_single_seed_has_no_spread() -> None:
    table = cells(markdown([row("a", 0, 2.0), row("b", 0, 1.5, None)]))
    assert table["a"][1:3] == ["2.0000", ""]
    assert table["b"][1:3] == ["1.5000", "-0.5000"]


def test_points_are_compared_over_the_seeds_that_both_have() -> None:
    rows = [row("a", 0, 2.0), row("a", 1, 3.0), row("b", 0, 1.0), row("c", 5, 1.0)]
    table = cells(markdown(rows))
    assert table["b"][2] == "-1.0000 (1 of 2 seeds)"
    assert table["c"][2] == ""


def test_tables_keep_the_seeds_of_earlier_calls(base: Experiment, ran: list[str]) -> None:
    changes: dict[str, dict[str, Any]] = {"a": {}, "b": {"model.attn_pattern": "L"}}
    run_sweep(points(base, seeds=(0, 1), **changes))
    again = points(base, seeds=(0,), **changes)
    # A seed of other settings is another run.
    claim(again.folder / "b/seed2", to_json(again.experiment("a", 2)))
    write_result(again.folder / "b/seed2", {"bits_per_byte": 9.0})
    rows = run_sweep(again)
    assert [(r["point"], r["seed"]) for r in rows] == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
    assert cells((again.folder / "results.md").read_text())["b"][0] == "2"


def test_the_legend_has_the_mean_over_seeds(
    base: Experiment, ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    records = [{"step": 8, "valid/bits_per_byte": 2.0}]
    monkeypatch.setattr(sweeps, "read_metrics", lambda folder: records)
    labels: list[str] = []
    plot = Axes.plot
    monkeypatch.setattr(
        Axes, "plot", lambda *a, label, **k: labels.append(label) or plot(*a, label=label, **k)
    )
    run_sweep(points(base, seeds=(0, 1), a={}))
    assert labels[-2:] == ["a: 2.500, 2 seeds", ""]


@pytest.mark.parametrize("setting", [{"seed": 3}, {"name": "x"}])
def test_a_point_sets_neither_its_seed_nor_its_name(
    base: Experiment, setting: dict[str, Any]
) -> None:
    with pytest.raises(UserError, match=f"point 'a' sets {next(iter(setting))}"):
        points(base, a=setting)


def test_points_are_shared_among_jobs_and_collected(
    base: Experiment, ran: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each job runs its point and writes no table; a folder that has all their runs gives it."""
    monkeypatch.setattr(sweeps, "_plot", lambda *_: b"")
    sweep = points(base, seeds=(0, 1), a={}, b={"model.attn_pattern": "L"})
    for place in ("whole", "jobs", "here"):
        (tmp_path / place).mkdir()
    monkeypatch.chdir(tmp_path / "whole")
    rows = run_sweep(sweep)
    monkeypatch.chdir(tmp_path / "jobs")
    ran.clear()
    assert [row["point"] for row in run_sweep(sweep, ["b"])] == ["b", "b"]
    assert ran == ["base/b/seed0", "base/b/seed1"]
    assert not (sweep.folder / "results.md").exists()
    monkeypatch.chdir(tmp_path / "here")
    source = str(tmp_path / "jobs" / "runs")
    collect(source, "base", RUNS, Shell())
    assert tabulate(sweep) == rows[2:]
    monkeypatch.chdir(tmp_path / "jobs")
    run_sweep(sweep, ["a"])
    monkeypatch.chdir(tmp_path / "here")
    assert len(collect(source, "base", RUNS, Shell())) == 4
    assert tabulate(sweep) == rows
    table = (tmp_path / "whole/runs/base/results.md").read_text()
    assert (sweep.folder / "results.md").read_text() == table
    (sweep.folder / "a/seed0/result.json").rename(sweep.folder / "a/seed0/experiment.json")
    with pytest.raises(UserError, match="a/seed0 holds a run that was begun here"):
        collect(source, "base", RUNS, Shell())
    with pytest.raises(UserError, match="else has no finished run"):
        collect(source, "else", RUNS, Shell())
    with pytest.raises(UserError, match="no point 'c'; there are: a, b"):
        run_sweep(sweep, ["a", "c"])


def test_results_come_from_a_bucket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One command, which leaves checkpoints and texts where they are."""
    gcloud = tmp_path / "gcloud"
    gcloud.write_text(
        '#!/bin/sh\nprintf "%s\\n" "$@" >"${0%/*}/said"\nfor last; do :; done\n'
        '/bin/mkdir "$last/a" && echo "{}" >"$last/a/result.json"\n'
    )
    gcloud.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert collect("gs://mine/jobs/runs/", "base", tmp_path, Shell()) == [tmp_path / "base/a"]
    assert (tmp_path / "base/a/result.json").read_text() == "{}\n"
    *words, exclude, there, _ = (tmp_path / "said").read_text().splitlines()
    assert words == ["storage", "rsync", "--recursive", "--quiet"]
    assert there == "gs://mine/jobs/runs/base"
    pattern = re.compile(exclude.removeprefix("--exclude="))
    assert not any(map(pattern.match, ("a/seed0/result.json", "metrics.jsonl", "b/model.json")))
    left = ("a/checkpoints/10/state/x", "a/my_result.json", "tokenizer.model", "a/results.md")
    assert all(map(pattern.match, left))
