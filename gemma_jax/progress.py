"""Progress of long work: a bar with the time left on a terminal, a line now and then in a log."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_LOG_EVERY_S = 20.0

Advance = Callable[..., None]
_silent = False


def silence() -> None:
    """Shows no more progress in this process: another one shows the same."""
    global _silent
    _silent = True


@contextmanager
def progress(label: str, total: int, *, start: int = 0, quiet: bool = False) -> Iterator[Advance]:
    """Yields `advance(n, note="")`, to be called with the units done since the last call.

    `start` units were done by an earlier run and do not count towards the speed. Everything goes
    to stderr, so that stdout holds results alone.
    """
    if quiet or _silent:
        yield lambda *_, **__: None
        return
    console = Console(stderr=True)
    if console.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(label, total=total, completed=start, note="")

            def advance(units: int, note: str = "") -> None:
                bar.update(task, advance=units, note=note)

            yield advance
        return

    began = logged = time.monotonic()
    done = start

    def report(units: int, note: str = "") -> None:
        nonlocal done, logged
        ends = done < total <= done + units  # a total that was estimated may be there early
        done += units
        now = time.monotonic()
        if now - logged < _LOG_EVERY_S and not ends:
            return
        logged = now
        left = (now - began) / max(done - start, 1) * max(total - done, 0)
        share = 100 * done / max(total, 1)
        print(
            f"{label}: {share:.0f} %, {left:.0f} s left  {note}".rstrip(),
            file=sys.stderr,
            flush=True,
        )

    yield report
