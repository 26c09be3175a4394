"""The peak figures of a chip, and how many of them `v5e:4x4` or `h100:8` names.

Sources, for one chip. TPUs: Google's pages of each generation (docs.cloud.google.com/tpu/docs/v5e,
v5p, v6e), bf16 peak, HBM, "bidirectional inter-chip interconnect bandwidth per chip", of which half
goes each way, and the data-center network, told of a chip (v5p: 50 Gbps) or of a pod of 256
(v5e: 6.4 Tbps, v6e: 25.6 Tbps). GPUs: NVIDIA's data sheets of the SXM modules, dense bf16, NVLink,
of which half goes each way, and one 400 Gbps (A100: 200 Gbps) adapter a GPU, as DGX systems have.
Memory is what a program may use: of TPUs as their compiler says when it refuses one (libtpu
0.0.50.1: 15.75, 95.73 and 31.24 GiB of 16, 95 and 32 GB), of GPUs the whole of it.
"""

import dataclasses
import math
import re

from gemma_jax.errors import UserError

_GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peaks of one chip, in bytes and seconds; links count one direction."""

    name: str
    flops: float  # dense bf16
    memory: float  # that a program may use
    memory_rate: float
    link_rate: float  # all of its links to chips of its slice (ICI) or host (NVLink)
    network_rate: float  # its share of the network between slices or hosts
    dimensions: int = 0  # of a TPU's torus; 0: a GPU
    pod: int = 0  # chips of the largest slice

    @property
    def is_tpu(self) -> bool:
        return self.dimensions > 0


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", 197e12, 15.75 * _GIB, 819e9, 200e9, 3.125e9, 2, 256),
        Chip("v5p", 459e12, 95.73 * _GIB, 2765e9, 600e9, 6.25e9, 3, 8960),
        Chip("v6e", 918e12, 31.24 * _GIB, 1638e9, 400e9, 12.5e9, 2, 256),
        Chip("a100", 312e12, 80e9, 2039e9, 300e9, 25e9),
        Chip("h100", 989e12, 80e9, 3350e9, 450e9, 50e9),
        Chip("h200", 989e12, 141e9, 4800e9, 450e9, 50e9),
    )
}
_GPUS_A_HOST = 8


@dataclasses.dataclass(frozen=True)
class Hardware:
    """`slices` of `shape` chips each; of GPUs a slice is a host."""

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def slice_size(self) -> int:
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        return self.slice_size * self.slices

    def __str__(self) -> str:
        if not self.chip.is_tpu:
            return f"{self.chip.name}:{self.size}"
        each = f"{self.chip.name}:{'x'.join(map(str, self.shape))}"
        return each if self.slices == 1 else f"{self.slices} x {each}"


def parse_topology(text: str, slices: int = 1) -> Hardware:
    """`v5e:4x4`, a slice of TPUs as Cloud TPU writes its shape."""
    name, _, shape = text.partition(":")
    known = [chip.name for chip in CHIPS.values() if chip.is_tpu]
    if name not in known:
        raise UserError(
            f"--topology {text}: there is no TPU '{name}' here; there are {', '.join(known)}, as "
            "in v5e:4x4."
        )
    chip = CHIPS[name]
    example = "x".join(["4"] * chip.dimensions)
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape) or shape.count("x") + 1 != chip.dimensions:
        raise UserError(
            f"--topology {text}: a slice of {name} has {chip.dimensions} dimensions, as in "
            f"{name}:{example}."
        )
    hardware = Hardware(chip, tuple(map(int, shape.split("x"))), slices)
    if hardware.slice_size > chip.pod:
        raise UserError(
            f"--topology {text} has {hardware.slice_size} chips and a pod of {name} {chip.pod}; "
            "make the slice smaller and give --slices."
        )
    return hardware


def parse_device(text: str) -> Hardware:
    """`h100:8` or `v5e:16`: a number of chips, for figures that need no compiler."""
    name, _, count = text.partition(":")
    if name not in CHIPS or not count.isdecimal() or int(count) < 1:
        raise UserError(
            f"--device {text} is no device; give one of {', '.join(CHIPS)} and how many, as in "
            "h100:8."
        )
    chip, size = CHIPS[name], int(count)
    most = chip.pod if chip.is_tpu else _GPUS_A_HOST
    slices = -(-size // most)
    if size % slices:
        raise UserError(
            f"--device {text} does not fill {slices} {'pods' if chip.is_tpu else 'hosts'} of "
            f"{most} evenly; give a multiple of {most}."
        )
    return Hardware(chip, (size // slices,), slices)
