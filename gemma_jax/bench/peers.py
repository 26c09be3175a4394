"""Other libraries on the same work, each a script of benchmarks/ in a process of its own."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gemma_jax.bench.config import BenchConfig
from gemma_jax.bench.timing import ROW_KEYS
from gemma_jax.errors import UserError
from gemma_jax.settings import to_json

FOLDER = Path(__file__).parents[2] / "benchmarks"

# (what, peer) -> script and its own options
_SCRIPTS: dict[tuple[str, str], tuple[str, ...]] = {
    ("train", "hf"): ("hf_train.py",),
    ("train", "hf-compile"): ("hf_train.py", "--compile"),
    ("train", "tunix"): ("tunix_train.py",),
    ("decode", "hf"): ("hf_generate.py",),
    ("decode", "hf-compile"): ("hf_generate.py", "--static"),
}


def check(config: BenchConfig, against: Sequence[str]) -> None:
    """Refuses what a peer cannot do, before anything is run."""
    for name in against:
        if (config.what, name) not in _SCRIPTS:
            known = sorted(peer for what, peer in _SCRIPTS if what == config.what)
            mend = f"choose {' or '.join(known)}" if known else "leave --against out"
            raise UserError(f"bench {config.what} has no peer '{name}'; {mend}.")
        if config.documents > 1 or config.data is not None:
            raise UserError(
                "peers see one document a sequence, so they are no measure for --documents or "
                "--data; leave --against out."
            )
        if not (FOLDER / _SCRIPTS[config.what, name][0]).exists():
            raise UserError(
                f"--against runs the scripts of benchmarks/ in a checkout, and {FOLDER} is not "
                "there; clone the repository."
            )


def command(name: str, config: BenchConfig, python: str | None) -> list[str]:
    """The command line of a peer."""
    script, *options = _SCRIPTS[config.what, name]
    sizes = {
        "batch": config.batch,
        "seq-len": config.seq_len,
        "steps": config.steps,
        "repeats": config.repeats,
        "dtype": config.model.compute_dtype,
    }
    if config.what == "train":
        sizes |= {"warmup": config.warmup, "microbatches": config.microbatches}
    given = [text for key, value in sizes.items() for text in (f"--{key}", str(value))]
    model = json.dumps(to_json(config.model))
    return [python or sys.executable, str(FOLDER / script), *options, *given, "--model", model]


def run(name: str, config: BenchConfig, python: str | None) -> dict[str, Any]:
    """What the peer's script prints: {"name", "device", "versions", "rows"}."""
    line = command(name, config, python)
    print(f"bench: running {name}, batch {config.batch}", file=sys.stderr, flush=True)
    try:
        done = subprocess.run(line, capture_output=True, text=True)
    except OSError as error:
        raise UserError(
            f"--peer-python {line[0]} cannot be started ({error.strerror}); give the interpreter "
            "of an environment that has the peer."
        ) from None
    printed = done.stdout.strip().splitlines()
    try:
        result = json.loads(printed[-1])
        if missing := [key for row in result["rows"] for key in ROW_KEYS if key not in row]:
            raise ValueError(f"its rows lack {missing[0]}")
    except (IndexError, ValueError, KeyError, TypeError) as error:
        said = done.stderr.strip().splitlines()
        cause = said[-1] if done.returncode and said else f"no result: {error}"
        raise UserError(
            f"the peer '{name}' failed ({cause[:300].rstrip('.')}); run {Path(line[1]).name} by "
            "hand, or give --peer-python an interpreter that has what it needs."
        ) from None
    return {**result, "name": name}
