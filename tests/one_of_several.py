"""The command line as one of several processes, which notes what it reads.

    one_of_several.py NOTES ARGUMENTS ... [then ARGUMENTS ...]

NOTES gets {"packed": [[...], ...], "shards": [[...], ...]}, the numbers of sequences and records
that this process has read for training, batch by batch as its threads happened to read them.
"""

import atexit
import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

from jax._src import compiler

from gemma_jax.cli import main
from gemma_jax.data.packing import PackedStream
from gemma_jax.distill.shards import TeacherShards

notes, arguments = Path(sys.argv[1]), sys.argv[2:]
read: dict[str, list[list[int]]] = {"packed": [], "shards": []}
read_packed, read_records = PackedStream.read, TeacherShards.__getitems__
write_program = compiler._cache_write


def written(*program):
    """JAX keeps what the first process has compiled. Programs of the others have names of their
    own, and each test would compile them again."""
    first = SimpleNamespace(global_state=SimpleNamespace(process_id=0))
    with mock.patch.object(compiler, "distributed", first):
        write_program(*program)


def packed(self, numbers, limit=None):
    if limit is None:  # not a pass over held-out text
        read["packed"].append([int(number) for number in numbers])
    return read_packed(self, numbers, limit)


def records(self, indices):
    read["shards"].append([int(index) for index in indices])
    return read_records(self, indices)


compiler._cache_write = written
PackedStream.read, TeacherShards.__getitems__ = packed, records
atexit.register(lambda: notes.write_text(json.dumps(read)))
for is_word, command in itertools.groupby(arguments, key=lambda word: word == "then"):
    if not is_word:
        main(list(command))
