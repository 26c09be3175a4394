"""What a compiled program does, read from its HLO text."""

import re
from typing import NamedTuple

_KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
_LINE = re.compile(rf"= (.*?) ({_KINDS})(?:-start)?\(")
_SHAPE = re.compile(r"\w+\[([\d,]*)\]")


class Collective(NamedTuple):
    kind: str
    shape: tuple[int, ...]  # of its result on a device


def collectives(program: str) -> list[Collective]:
    """Every collective of a program, one for each of its results."""
    return [
        Collective(kind, shape)
        for results, kind in _LINE.findall(program)
        for shape in map(_dims, _SHAPE.findall(results))
    ]


def shapes(program: str) -> set[tuple[int, ...]]:
    """The shape of every array in a program, also of those inside fused loops."""
    return set(map(_dims, _SHAPE.findall(program)))


def _dims(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.split(",") if size)
