"""Experiment files: Python files that define BASE (an Experiment) or SWEEP, or both.

A function AFTER, where there is one, is handed the sweep when all its points are finished; the text
that it returns is printed.
"""

import contextvars
import runpy
import sys
import traceback
from collections.abc import Callable, Mapping
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

    Its folder can be imported from, as with `python FILE`. Raises UserError where the file is
    missing, an argument is unknown to it or BASE or SWEEP is something else, and for a mistake in
    a line of it or of a neighbour. An error in what they call keeps its traceback.
    """
    defined = _run(Path(path), arguments or {})
    _check(Path(path), defined)
    return defined


def load_function(place: str) -> Callable:
    """The function that `FILE.py:NAME` stands for."""
    path, _, name = place.rpartition(":")
    if not path or not name.isidentifier():
        raise UserError(f"'{place}' must be FILE.py:FUNCTION.")
    function = _run(Path(path), {}).get(name)
    if not callable(function):
        raise UserError(f"{path} defines no function {name}; give another name.")
    return function


def _run(path: Path, arguments: Mapping[str, Any]) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"there is no experiment file {path}; give the path of a Python file.")
    given, known = dict(arguments), {}  # type: dict[str, Any], dict[str, Any]
    token = _ARGUMENTS.set((given, known))
    folder = str(path.parent.resolve())
    sys.path.insert(0, folder)
    try:
        defined = runpy.run_path(str(path))
    except UserError:
        raise
    except (SyntaxError, UnicodeDecodeError) as error:
        place = getattr(error, "filename", None) or path
        raise UserError(f"{place} is not valid Python: {error}; mend it.") from error
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        file = Path(frame.filename)
        if not file.is_file() or str(file.parent.resolve()) != folder:
            raise
        raise UserError(
            f"{file} line {frame.lineno}: {type(error).__name__}: {error}; mend that line."
        ) from error
    finally:
        _ARGUMENTS.reset(token)
        sys.path.remove(folder)
    if unknown := sorted(given.keys() - known.keys()):
        takes = ", ".join(f"{name}={value!r}" for name, value in known.items()) or "none"
        raise UserError(f"{path} takes no argument {unknown[0]!r}; it takes: {takes}.")
    return defined


def _check(path: Path, defined: Mapping[str, Any]) -> None:
    from gemma_jax.experiment_config import Experiment
    from gemma_jax.sweep import Sweep

    if "BASE" not in defined and "SWEEP" not in defined:
        raise UserError(
            f"{path} defines neither BASE (an Experiment) nor SWEEP (points or a grid)."
        )
    for name, kind in (("BASE", Experiment), ("SWEEP", Sweep)):
        if name in defined and not isinstance(defined[name], kind):
            raise UserError(
                f"{name} of {path} is a {type(defined[name]).__name__}; it must be a "
                f"{kind.__name__}."
            )
    if "AFTER" in defined and not callable(defined["AFTER"]):
        raise UserError(f"AFTER of {path} must be a function of a Sweep that returns a text.")
