"""The experiment files that a command names, with the changes of its line."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from gemma_jax.errors import UserError
from gemma_jax.options import seed


def _load_file(path: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    from gemma_jax.experiment_file import load_file
    from gemma_jax.settings import parse_assignments

    return load_file(path, parse_assignments(arguments.arg, {}))


def _changes(arguments: argparse.Namespace) -> dict[str, Any]:
    from gemma_jax.experiment_config import SETTINGS
    from gemma_jax.settings import parse_assignments

    return parse_assignments(arguments.set, SETTINGS)


def load_base(path: Path, arguments: argparse.Namespace) -> Any:
    from gemma_jax.settings import override

    defined = _load_file(path, arguments)
    base = defined["BASE"] if "BASE" in defined else defined["SWEEP"].base
    return override(base, _changes(arguments))


def load_point(arguments: argparse.Namespace) -> Any:
    """The experiment of `--point`, or BASE."""
    if arguments.point is None:
        return load_base(Path(arguments.file), arguments)
    sweep = load_sweep(Path(arguments.file), arguments)
    if arguments.point not in sweep.points:
        known = ", ".join(sweep.points)
        raise UserError(f"there is no point '{arguments.point}'; there are: {known}.")
    return sweep.experiment(arguments.point, sweep.seeds[0])


def load_sweep(path: Path, arguments: argparse.Namespace) -> Any:
    return load_sweep_file(path, arguments)[0]


def load_sweep_file(path: Path, arguments: argparse.Namespace) -> tuple[Any, Any]:
    """The SWEEP of a file with the changes of the command line, and its AFTER or None."""
    from gemma_jax.settings import override

    defined = _load_file(path, arguments)
    if "SWEEP" not in defined:
        raise UserError(f"{path} defines no SWEEP; use `gemma-jax train {path}`.")
    sweep, changes = defined["SWEEP"], _changes(arguments)
    seeds = sweep.seeds
    if "seed" in changes:
        if arguments.verb == "sweep":
            raise UserError(
                f"--set seed={changes['seed']} is for one run, and a sweep has seeds; use --seeds "
                f"{changes['seed']}."
            )
        seeds = (changes["seed"],)
    if getattr(arguments, "seeds", None) is not None:
        try:
            seeds = tuple(seed(text) for text in arguments.seeds.split(","))
        except (ValueError, argparse.ArgumentTypeError):
            raise UserError(
                f"--seeds '{arguments.seeds}' must be whole numbers from 0 on, with commas, "
                "such as 0,1,2."
            ) from None
    sweep = dataclasses.replace(sweep, base=override(sweep.base, changes), seeds=seeds)
    return sweep, defined.get("AFTER")
