"""From what a program needs and what a chip can do: the least time of a step.

Williams et al. 2009: a step takes at least as long as its matmuls at the peak rate, its memory
traffic at the memory's, and its collectives at the links'. They run beside each other at best, so
the longest of them bounds the step; without any overlap it takes their sum.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gemma_jax.plan.chips import Chip
from gemma_jax.plan.hlo import Collective

SECONDS_A_DAY = 86_400


class Traffic(NamedTuple):
    """Bytes that a chip sends in a step: within its slice (or host), and to other ones."""

    links: float
    network: float
    by_kind: dict[str, float]


def traffic(collectives: Sequence[Collective], slice_of: np.ndarray) -> Traffic:
    """A collective over several slices is done in parts, as a ring within each slice and one of
    each chip's share across slices (Cloud TPU Multislice does it so): its bytes count for both."""
    links, network = 0.0, 0.0
    by_kind: dict[str, float] = {}
    for one in collectives:
        inside, across = _split(one, slice_of)
        links, network = links + inside * one.times, network + across * one.times
        for name, sent in (("links", inside), ("network", across)):
            if sent:
                kind = f"{one.kind} over {name}"
                by_kind[kind] = by_kind.get(kind, 0.0) + sent * one.times
    return Traffic(links, network, by_kind)


def _split(one: Collective, slice_of: np.ndarray) -> tuple[float, float]:
    slices = len(set(slice_of[one.groups[0]].tolist()))
    if slices == 1:
        return one.sent, 0.0
    members = one.groups.shape[1]
    if members == slices or one.kind.startswith("collective"):
        return 0.0, one.sent
    each = members // slices  # of a group in one slice
    double = 2 if one.kind == "all-reduce" else 1
    inside = double * one.bytes * (each - 1) / each
    return inside, double * one.bytes / each * (slices - 1) / slices


class Roofline(NamedTuple):
    """Seconds of a step, by what bounds it."""

    compute: float
    memory: float
    links: float
    network: float

    @property
    def step(self) -> float:
        return max(self)

    @property
    def one_after_another(self) -> float:
        return sum(self)

    @property
    def bound(self) -> str:
        return self._fields[self.index(max(self))]


def roofline(chip: Chip, flops: float, memory_bytes: float, sent: Traffic) -> Roofline:
    """`flops` and bytes are those of one chip."""
    return Roofline(
        flops / chip.flops,
        memory_bytes / chip.memory_rate,
        sent.links / chip.link_rate,
        sent.network / chip.network_rate,
    )
