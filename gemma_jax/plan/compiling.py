"""Compiles a traced step for TPUs that are not there, and keeps what was found.

`libtpu` holds the compiler of every generation; a CPU machine is enough to run it. What it says of
a program is kept in the user's cache, so that the same plan is compiled once.
"""

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

from gemma_jax.errors import UserError
from gemma_jax.files import compilation_cache, read_json, write_json
from gemma_jax.plan.chips import Hardware
from gemma_jax.plan.hlo import Collective, Program
from gemma_jax.plan.memory import Memory, memory_of, part_bytes
from gemma_jax.plan.programs import Traced

_REFUSED = re.compile(r"\((\d+(?:\.\d+)?)([KMG]?)\) exceeds available HBM")
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclass(frozen=True)
class Compiled:
    """What the compiler says of a program, for one chip. Of one that it refuses, because its
    temporaries alone do not fit, the memory is all there is."""

    memory: Memory
    refused: bool
    flops: float  # XLA's figure: loops once
    memory_bytes: float  # XLA's figure, loops as often as they turn
    collectives: tuple[Collective, ...]
    seconds: float


def devices_of(hardware: Hardware) -> list[Any]:
    """The chips of a topology as devices to compile for, in the order of their slices."""
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "compiling for TPUs needs libtpu: start with `GEMMA_JAX_EXTRA=cpu,plan ./launch.sh "
            "...`, or give --device, such as --device "
            f"{hardware.chip.name}:{hardware.size}, for the figures that need no compiler."
        )
    # A compiler needs no chip: other processes may have theirs, and nobody need be asked which.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    name = f"{hardware.chip.name}:{'x'.join(map(str, hardware.shape))}"
    options = {"num_slices": hardware.slices} if hardware.slices > 1 else {}
    try:
        with _quiet():
            found = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except Exception as error:  # libtpu's own kinds
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(
            f"--topology {name}: libtpu knows no such slice ({reason}); give one that Cloud TPU "
            "has, such as 4x4."
        ) from None
    return list(found.devices)


def compile_step(traced: Traced, hardware: Hardware) -> Compiled:
    """Compiles, or finds what an earlier plan found of the same program."""
    with traced.layout.active():
        lowered = traced.program.lower()
    place = _place(lowered, hardware)
    if place.exists():
        kept = read_json(place, "what a compiler said of a program")
    else:
        kept = _compile(lowered, traced, hardware.size)
        write_json(place, kept)
    memory = Memory(parts=part_bytes(traced.parts), **kept["memory"])
    found = (Collective(**one | {"groups": np.array(one["groups"])}) for one in kept["collectives"])
    names = ("refused", "flops", "memory_bytes", "seconds")
    own: dict[str, Any] = {name: kept[name] for name in names}
    return Compiled(memory=memory, collectives=tuple(found), **own)


def _compile(lowered: Any, traced: Traced, num_chips: int) -> dict[str, Any]:
    began = time.monotonic()
    try:
        with _quiet(), _no_cache():
            compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        match = _REFUSED.search(str(error))
        if match is None:
            raise
        arguments = sum(part_bytes(traced.parts).values())
        temporary = int(float(match[1]) * _UNITS[match[2]])
        return {
            "memory": {"arguments": arguments, "temporary": temporary, "program": 0},
            "refused": True,
            "flops": 0.0,
            "memory_bytes": 0.0,
            "collectives": [],
            "seconds": time.monotonic() - began,
        }
    memory, cost = memory_of(compiled, traced.parts), compiled.cost_analysis()
    program = Program(compiled.as_text(), num_chips)
    return {
        "memory": {name: getattr(memory, name) for name in ("arguments", "temporary", "program")},
        "refused": False,
        "flops": cost.get("flops", 0.0),
        "memory_bytes": cost.get("bytes accessed", 0.0) * program.turns(),
        "collectives": [
            one._asdict() | {"groups": one.groups.tolist()} for one in program.collectives()
        ],
        "seconds": time.monotonic() - began,
    }


def versions() -> dict[str, str]:
    names = ("jax", "jaxlib", "libtpu")
    return {x: importlib.metadata.version(x) for x in names if importlib.util.find_spec(x)}


def _place(lowered: Any, hardware: Hardware) -> Path:
    """The file of a program: its name follows from the program, the chips, the compiler and how
    its text is read."""
    readers = "".join(
        (Path(__file__).parent / name).read_text() for name in ("hlo.py", "memory.py")
    )
    key = f"{lowered.as_text()}{hardware}{sorted(versions().items())}{readers}"
    name = hashlib.sha256(key.encode()).hexdigest()[:24]
    return compilation_cache().parent.parent / "plan" / f"{name}.json"


@contextlib.contextmanager
def _no_cache() -> Iterator[None]:
    """JAX's own cache would have to load the program onto a device to give it back."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """libtpu looks for the machine that it is on, and tells on stderr that it is none of a TPU."""
    saved = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)
