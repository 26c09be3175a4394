"""Experiment files: Python files that define BASE (an Experiment) or SWEEP, or both."""

import contextvars
import runpy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemma_jax.errors import UserError

_ARGUMENTS: contextvars.ContextVar[tuple[dict[str, Any], dict[str, Any]]] = contextvars.ContextVar(
    "arguments"
)


def argument[T](name: str, default: T) -> T:
    """A value that an experiment file takes from the command line (`--arg name=value`).

    Called while the file is read. The value must be of the default's type.
    """
    given, known = _ARGUMENTS.get(({}, {}))
    known[name] = default
    value = given.get(name, default)
    if isinstance(default, float) and isinstance(value, int):
        value = float(value)
    if isinstance(default, str) and not isinstance(value, str):
        value = str(value)
    if type(value) is not type(default):
        raise UserError(
            f"--arg {name}={value!r} must be a {type(default).__name__}, such as {default!r}."
        )
    return value


def load_file(path: str | Path, arguments: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Runs an experiment file and returns what it defines.

    Raises UserError where the file is missing or an argument is unknown to it. An error inside of
    it keeps its traceback: the file is the researcher's own code.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no experiment file {path}; give the path of a Python file.")
    given, known = dict(arguments or {}), {}  # type: dict[str, Any], dict[str, Any]
    token = _ARGUMENTS.set((given, known))
    try:
        defined = runpy.run_path(str(path))
    finally:
        _ARGUMENTS.reset(token)
    if unknown := sorted(given.keys() - known.keys()):
        takes = ", ".join(f"{name}={value!r}" for name, value in known.items()) or "none"
        raise UserError(f"{path} takes no argument {unknown[0]!r}; it takes: {takes}.")
    if "BASE" not in defined and "SWEEP" not in defined:
        raise UserError(
            f"{path} defines neither BASE (an Experiment) nor SWEEP (points or a grid)."
        )
    return defined
