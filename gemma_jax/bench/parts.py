"""Which part of the model takes the time, from a profile.

XLA notes with each instruction where it comes from, as a path of modules and named scopes
(`op_name`), and the profiler notes with each kernel the instruction that it runs. So a kernel
belongs to the first part that its instruction's path names. A fusion is one kernel, and XLA gives
it the path of its root; where that names no part, the majority of what was fused decides. What
still has none is `other`: residual sums, stacked slices, copies.

On a GPU the times are those of kernels on the device. On a CPU they are those of XLA's
instructions on all threads, so shares hold for the work and not for the time on the clock. A TPU's
profile has another form, and its parts are not told.
"""

import collections
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

OTHER = "other"
# First of a path that matches. Projections, QK-norm and RoPE belong to attention, the embedding's
# gradient to its lookup, clipping and the norms that are logged to the optimizer.
_SCOPES = {
    "attention": "attention",
    "mlp": "mlp",
    "head": "head",
    "optimizer": "optimizer",
    "lookup": "lookup",
    "norms": r"\w+_norm",
}
_PART = re.compile("|".join(rf"(?P<{part}>\b{scope}\b)" for part, scope in _SCOPES.items()))
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = .*? ([a-z][\w\-]*)\(")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_CALLED = re.compile(r"(?:calls|to_apply)=%?([\w.\-]+)")
_HOLDERS = {"while", "conditional", "call"}  # their time is that of the instructions inside


def part_of(op_name: str) -> str:
    """The part that a path names first, such as jit(step)/jvp(Decoder)/.../mlp/dot_general."""
    found = _PART.search(op_name)
    return found.lastgroup or OTHER if found else OTHER


def parts_of_instructions(hlo: str) -> dict[str, str | None]:
    """The part of each instruction of a compiled program's text; None for those that only hold
    others (loops, calls)."""
    votes: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    called: dict[str, str] = {}
    parts: dict[str, str | None] = {}
    computation = ""
    for line in hlo.splitlines():
        if header := _COMPUTATION.match(line):
            computation = header[1]
        if not (found := _INSTRUCTION.match(line)):
            continue
        name, opcode = found.groups()
        op_name = _OP_NAME.search(line)
        part = part_of(op_name[1]) if op_name else OTHER
        if part != OTHER:
            votes[computation][part] += 1
        elif inner := _CALLED.search(line):
            called[name] = inner[1]
        parts[name] = None if opcode in _HOLDERS else part
    for name, inside in called.items():
        if parts[name] is not None and votes[inside]:
            parts[name] = votes[inside].most_common(1)[0][0]
    return parts


def profile(run: Callable[[], Any], program: Any) -> tuple[dict[str, float], float] | None:
    """(share of each part in the time of all kernels, kernel time over time on the clock) of
    `run`, which runs the compiled `program`; None where the profile does not tell."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            began = time.perf_counter()
            run()
            seconds = time.perf_counter() - began
        traces = [
            jax.profiler.ProfileData.from_file(str(path))
            for path in Path(folder).rglob("*.xplane.pb")
        ]
    text = program.as_text()
    parts = parts_of_instructions(text)
    module = text.partition(",")[0].removeprefix("HloModule ").strip()
    times: dict[str, float] = collections.defaultdict(float)
    devices = set()
    for trace in traces:
        for plane, instruction, owner, nanoseconds in _quiet(_kernels(trace)):
            # Names of instructions are those of one program; others only place inputs.
            part = parts.get(instruction, OTHER) if owner == module else OTHER
            if part is not None:
                times[part] += nanoseconds
                devices.add(plane)
    total = sum(times.values())
    if not total:
        return None
    shares = {part: times[part] / total for part in (*_SCOPES, OTHER) if part in times}
    return shares, total / 1e9 / (seconds * len(devices))


def _quiet[T](found: Iterator[T]) -> list[T]:
    """Without the warning about its own types that jaxlib gives, and cannot give as an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return list(found)


def _kernels(trace: Any) -> Iterator[tuple[str, str, str, float]]:
    """(device, instruction, program, nanoseconds) of each kernel, or instruction on a CPU."""
    planes = list(trace.planes)
    gpus = [plane for plane in planes if plane.name.startswith("/device:GPU")]
    for plane in gpus or [plane for plane in planes if plane.name == "/host:CPU"]:
        for line in plane.lines:
            if gpus and not line.name.startswith("Stream"):
                continue
            for event in line.events:
                stats = dict(event.stats)
                if gpus or "hlo_op" in stats:
                    owner = str(stats.get("hlo_module", ""))
                    yield plane.name, str(stats.get("hlo_op", "")), owner, event.duration_ns
