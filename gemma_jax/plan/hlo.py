"""What a compiled program does, read from its HLO text: its loops, and what crosses chips.

XLA's own cost analysis counts the body of a loop once; here a loop counts as often as it turns. The
trip count is XLA's (`known_trip_count`) where the program says it, and else the constant that the
loop's condition compares its counter with, as scans of JAX have it: from 0, by 1. A loop that ends
by its data (decoding) counts once.

Two things are peculiar to the compiler of TPUs. A collective that runs beside other work stands in
each of the fusions that it runs beside, under one channel, and is one collective. And a sum that is
scattered is an all-reduce inside a fusion called `all-reduce-scatter`.
"""

import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_KINDS = (
    "all-gather|all-reduce|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute|"
    "collective-broadcast"
)
_COLLECTIVE = re.compile(rf"= (.*?) ({_KINDS})(-start)?\(")
_WHILE = re.compile(r"\bwhile\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)|\bcalled_computations=\{(.*?)\}"
)
_BRANCHES = re.compile(r"(?:branch_computations=\{(.*?)\}|(?:true|false)_computation=%?([\w.\-]+))")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONSTANT = re.compile(r"%?([\w.\-]+) = \w+\[\]\S* constant\((\d+)\)")
_COMPARE = re.compile(r"ROOT .* compare\((.*?)\), direction=(LT|GT)")
_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
_BITS = re.compile(r"\d+")
_FUSION = re.compile(r" fusion\(.*calls=%?([\w.\-]+)")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_IN_MEMORY = re.compile(r"\w+\[[\d,]*\](?:\{[^{}]*\})?")


class Collective(NamedTuple):
    """One collective of a program, on each chip.

    `bytes` is the size of its result (of a reduce-scatter, of its operand), `times` how often a
    step runs it. `groups` [n, size] holds the numbers of the chips that take part together; None
    where it is a permutation, given by `pairs`.
    """

    kind: str
    bytes: int
    times: int
    groups: np.ndarray
    where: str  # the operation of the model that it stems from

    @property
    def sent(self) -> float:
        """Bytes that a chip sends each time, by the algorithm that sends least: around a ring."""
        n = self.groups.shape[1]
        if self.kind in ("collective-permute", "collective-broadcast"):
            return self.bytes
        share = (n - 1) / n
        return self.bytes * share * (2 if self.kind == "all-reduce" else 1)


class Program:
    """The text of a compiled program, split into its computations."""

    def __init__(self, text: str, num_chips: int) -> None:
        self._chips = num_chips
        self._lines: dict[str, list[str]] = {}
        self._fused: dict[str, str] = {}  # a fusion's computation -> the one that it stands in
        self._entry = ""
        current: list[str] = []
        for line in text.splitlines():
            if match := _COMPUTATION.match(line):
                current = self._lines[match[2]] = []
                name = match[2]
                if match[1]:
                    self._entry = name
                continue
            current.append(line)
            if match := _FUSION.search(line):
                self._fused[match[1]] = name

    def times(self) -> dict[str, int]:
        """How often a step runs each computation."""
        counts = dict.fromkeys(self._lines, 0)
        for name, called in self._calls_in_order():
            counts[name] += called
        return counts

    def collectives(self) -> list[Collective]:
        times, seen = self.times(), set()
        found = []
        for name, lines in self._lines.items():
            for line in lines if times[name] else ():
                if not (match := _COLLECTIVE.search(line)):
                    continue
                channel, around = _CHANNEL.search(line), self._fused.get(name)
                if around is not None and channel is not None:
                    if (around, channel[1]) in seen:
                        continue
                    seen.add((around, channel[1]))
                found.append(self._collective(line, match, times[name], name))
        return found

    def turns(self) -> float:
        """By how much loops multiply the traffic of memory, as the results of all operations weigh
        it: what XLA counts once for the body of a loop, it counts as often as the loop turns."""
        once, often = 0.0, 0.0
        waiting = [(self._entry, 1, 1)]
        while waiting:
            name, times, trips = waiting.pop()
            for line in self._lines[name]:
                size = _result_bytes(line, trips)
                once, often = once + size, often + size * times
                if match := _WHILE.search(line):
                    inner = self._trips(line, match[1])
                    waiting.append((match[2], times * inner, inner))
        return often / once if once else 1.0

    def _collective(self, line: str, match: re.Match, times: int, inside: str) -> Collective:
        result, kind, start = match[1], match[2], match[3]
        arrays = list(_sizes(result))
        if start and kind in ("all-gather", "collective-permute"):
            # The result of a start is (operands, results, ...): the results alone count.
            inputs = line[match.end() :].split(")")[0].count("%")
            arrays = arrays[inputs : 2 * inputs]
        groups = _groups(line, self._chips)
        size = sum(arrays) * (groups.shape[1] if kind == "reduce-scatter" else 1)
        if inside.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"
        name = re.search(r'op_name="(.*?)"', line)
        return Collective(kind, size, times, groups, name[1] if name else "")

    def _calls_in_order(self) -> Iterator[tuple[str, int]]:
        """(computation, how often it is run by one call chain), over all chains from the entry."""
        waiting = [(self._entry, 1)]
        while waiting:
            name, times = waiting.pop()
            yield name, times
            waiting += [(callee, times * n) for callee, n in self._callees(name)]

    @functools.cache  # noqa: B019 a program lives as long as its plan
    def _callees(self, name: str) -> list[tuple[str, int]]:
        found = []
        for line in self._lines[name]:
            if match := _WHILE.search(line):
                trips = self._trips(line, match[1])
                found += [(match[1], trips), (match[2], trips)]
                continue
            named = [a or b for a, b in (*_CALLED.findall(line), *_BRANCHES.findall(line))]
            each = [one.strip().lstrip("%") for part in named for one in part.split(",")]
            found += [(one, 1) for one in each if one in self._lines]
        return found

    def _trips(self, line: str, condition: str) -> int:
        if known := _TRIPS.search(line):
            return int(known[1])
        lines = self._lines[condition]
        constants = {m[1]: m[2] for one in lines if (m := _CONSTANT.search(one))}
        for one in lines:
            if match := _COMPARE.search(one):
                left, right = (re.search(r"%([\w.\-]+)$", x.strip()) for x in match[1].split(","))
                bound = right if match[2] == "LT" else left
                if bound and bound[1] in constants:
                    return int(constants[bound[1]])
        return 1


_NO_TRAFFIC = re.compile(
    r" (parameter|constant|tuple|get-tuple-element|bitcast|while|[\w-]+-done|after-all)\("
)
_RESULT = re.compile(r"^\s*(?:ROOT )?%?[\w.\-]+ = (\(.*?\)|\S+) [\w-]+\(")


def _result_bytes(line: str, trips: int) -> float:
    """Of an operation in a loop of so many turns: one that updates a part of what the loop stacks
    writes that part alone."""
    if _NO_TRAFFIC.search(line) or not (match := _RESULT.match(line)):
        return 0.0
    # S(1) and above: a core's own memory, of results that never leave it.
    arrays = [array for array in _IN_MEMORY.findall(match[1]) if "S(" not in array]
    parts = trips if "dynamic-update-slice" in line.partition("(")[0] else 1
    return sum(_sizes(" ".join(arrays))) / parts


def _sizes(shapes: str) -> Iterator[int]:
    """Bytes of each array in the text of a shape, a tuple's or one alone."""
    for kind, dims in _ARRAY.findall(shapes):
        bits = _BITS.search(kind)
        width = 8 if kind == "pred" else int(bits[0]) if bits else 0
        yield math.prod(int(size) for size in dims.split(",") if size) * width // 8


def _groups(line: str, num_chips: int) -> np.ndarray:
    """The groups of a collective [n, size]: of a permutation its pairs."""
    if match := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line):
        return _mesh_groups(match[1], match[2])
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        ids = np.arange(num_chips).reshape([int(x) for x in match[3].split(",")])
        if match[4]:
            ids = ids.transpose([int(x) for x in match[4].split(",")])
        return ids.reshape(int(match[1]), int(match[2]))
    if match := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{.*?\})\}", line):
        groups = re.findall(r"\{([\d,]+)\}", match[1])
        return np.array([[int(x) for x in group.split(",")] for group in groups])
    return np.arange(num_chips)[None]  # no groups: all of them


def _mesh_groups(mesh: str, along: str) -> np.ndarray:
    """Groups along axes of a mesh, as `'data'=4,'tensor'=2` and `'tensor'` say it; `'data':(2)2` is
    a part of an axis: after the 2 that its outer part counts, the next 2."""
    sizes = {name: int(size) for name, size in re.findall(r"'(.*?)'=(\d+)", mesh)}
    wanted = re.findall(r"'(.*?)'(?::\((\d+)\)(\d+))?", along)
    shape: list[int] = []
    inside: list[int] = []
    for name, size in sizes.items():
        parts = [size]
        chosen = [(int(before or 1), int(n or size)) for axis, before, n in wanted if axis == name]
        if chosen:
            before, n = chosen[0]
            parts = [before, n, size // before // n]
            inside.append(len(shape) + 1)
        shape += parts
    ids = np.arange(math.prod(shape)).reshape(shape)
    outside = [axis for axis in range(len(shape)) if axis not in inside]
    size = math.prod(shape[axis] for axis in inside)
    return ids.transpose(*outside, *inside).reshape(-1, size)
