"""Runs an experiment in processes that kill themselves at some moment, until it is done.

    killed.py FILE KILLS SEED

The program is imported once; each start is a fork of it that works in the current folder. Prints
the moments of the kills, a line each.
"""

import os
import random
import signal
import sys
import threading
from pathlib import Path
from typing import NamedTuple

from jax._src import compiler

from gemma_jax import experiment
from gemma_jax.data import record_file, shard_writer, tokens
from gemma_jax.experiment_file import load_file
from gemma_jax.sharding import Layout
from gemma_jax.training import checkpoint, loop, metrics

AT_LAST = 12  # steps that a start lives for: enough to finish what it has begun to save

# moment: (what is called then, its name, at which call at the latest)
MOMENTS = {
    "start": (os, "getpid", 1),  # after some time
    "tokenizer": (tokens, "train_tokenizer", 1),
    "text": (shard_writer, "RecordWriter", 3),
    "compile": (compiler, "compile_or_get_cached", 8),
    "batch": (Layout, "place", 14),
    "step": (loop.Lookout, "note", AT_LAST),
    "log": (metrics.MetricsLog, "write", 3),
    "save": (checkpoint.Checkpoints, "save", 2),
    "evaluation": (loop, "_validated", 2),
    "record": (record_file.RecordWriter, "write", 8),
    "shard": (record_file.RecordWriter, "finish", 2),
    "rename": (os, "rename", 6),
    "replace": (os, "replace", 6),
}


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Kill(NamedTuple):
    moment: str
    number: int  # at this call
    when: str
    delay: float


def choose(draw: random.Random) -> Kill:
    moment = draw.choice(list(MOMENTS))
    most, delay = MOMENTS[moment][2], 3.0 if moment == "start" else 0.1
    when = draw.choice(("before", "after", "later"))
    return Kill(moment, draw.randint(1, most), when, draw.uniform(0, delay))


def arm(kill: Kill) -> None:
    """Puts the kill into the program: before a call, after it, or a little later."""
    owner, name, _ = MOMENTS[kill.moment]
    if kill.moment != "step":  # where the moment never comes
        arm(Kill("step", AT_LAST, "before", 0.0))
    if kill.moment == "start":
        threading.Timer(kill.delay, die).start()
        return
    call, calls = getattr(owner, name), []

    def armed(*arguments, **settings):
        calls.append(None)
        now = len(calls) == kill.number
        if now and kill.when == "before":
            die()
        result = call(*arguments, **settings)
        if now and kill.when == "after":
            die()
        if now:
            threading.Timer(kill.delay, die).start()
        return result

    setattr(owner, name, armed)


def start(file: Path, kill: Kill | None) -> int:
    """The exit status of a process that works until it is killed, or to the end."""
    child = os.fork()
    if child == 0:
        try:
            if kill is not None:
                arm(kill)
            experiment.run(load_file(file)["BASE"])
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]


if __name__ == "__main__":
    file, kills, draw = Path(sys.argv[1]), int(sys.argv[2]), random.Random(int(sys.argv[3]))
    for number in range(kills):
        kill = choose(draw)
        status = start(file, kill)
        print(number, *kill, flush=True)
        if status != signal.SIGKILL:
            sys.exit(f"it ended with status {status}")
    sys.exit(start(file, None) != 0)
