"""The results of runs that were made elsewhere, brought into the run folders of this machine."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from gemma_jax.errors import UserError
from gemma_jax.machines.shell import Shell

# Of a finished run, what tables and plots are made of; its result comes last, so that half a copy
# counts as none.
_FILES = ("experiment.json", "model.json", "metrics.jsonl", "result.json")
_WANTED = r"(.*/)?(experiment\.json|model\.json|metrics\.jsonl|result\.json)$"


def collect(source: str, name: str, runs: Path, shell: Shell) -> list[Path]:
    """Copies the finished runs of a sweep from `source` (gs://... or a folder that holds runs, as
    `runs` does), and returns their folders here. Those that are finished here stay as they are."""
    with _local(source, name, shell) as found:
        taken = []
        for result in sorted((found / name).rglob(_FILES[-1])):
            here = runs / result.parent.relative_to(found)
            taken.append(here)
            if (here / _FILES[-1]).exists():
                continue
            if (here / _FILES[0]).exists():
                raise UserError(
                    f"{here} holds a run that was begun here and is finished in {source}; move one "
                    "of them away."
                )
            _copy(result.parent, here, _FILES)
    if not taken:
        raise UserError(
            f"{source}/{name} has no finished run; give the place that holds the runs by name, "
            "such as gs://mine/jobs/runs."
        )
    return taken


def _copy(there: Path, here: Path, names: Sequence[str]) -> None:
    here.mkdir(parents=True, exist_ok=True)
    for file in names:
        if (there / file).exists():
            aside = here / f"{file}.partial"
            shutil.copyfile(there / file, aside)
            aside.replace(here / file)


@contextlib.contextmanager
def _local(source: str, name: str, shell: Shell) -> Iterator[Path]:
    """The source as a folder of this machine."""
    if not source.startswith("gs://"):
        yield Path(source)
        return
    with tempfile.TemporaryDirectory() as aside:
        there = f"{source.rstrip('/')}/{name}"
        (Path(aside) / name).mkdir(parents=True)
        argv = ["gcloud", "storage", "rsync", "--recursive", "--quiet", f"--exclude=^(?!{_WANTED})"]
        shell.do([*argv, there, f"{aside}/{name}"], f"reading {there}")
        yield Path(aside)
