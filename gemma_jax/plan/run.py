"""The plan of a step: what each chip would hold and how long it would take at least."""

from typing import Any

import numpy as np

from gemma_jax.claims import commit
from gemma_jax.plan.chips import Hardware
from gemma_jax.plan.compiling import Compiled, compile_step, devices_of, no_cache, versions
from gemma_jax.plan.estimate import (
    abstract_layout,
    estimate_flops,
    estimate_memory,
    estimate_memory_bytes,
    estimate_traffic,
)
from gemma_jax.plan.flops import count_flops
from gemma_jax.plan.memory import Memory
from gemma_jax.plan.programs import Task, trace
from gemma_jax.plan.roofline import SECONDS_A_DAY, Roofline, Traffic, roofline, traffic
from gemma_jax.sharding import make_layout

type Plan = dict[str, Any]


def plan(task: Task, hardware: Hardware) -> Plan:
    """The step of `task` compiled for `hardware`, which has a compiler here: TPUs."""
    devices = devices_of(hardware)
    layout = make_layout(task.mesh, devices)
    with no_cache():
        traced = trace(task, layout)
        compiled = compile_step(traced, hardware)
    executed = count_flops(traced.program.jaxpr)
    if compiled.refused:
        sent, moved = Traffic(0, 0, {}), 0.0
    else:
        slices = np.array([getattr(x, "slice_index", 0) or 0 for x in layout.mesh.devices.flat])
        sent, moved = traffic(compiled.collectives, slices), compiled.memory_bytes
    return _described(task, hardware, compiled.memory, executed, sent, moved, compiled)


def estimate(task: Task, hardware: Hardware) -> Plan:
    """The same by arithmetic alone (`estimate.py`)."""
    layout = abstract_layout(task, hardware)
    memory = estimate_memory(task, layout)
    sent = estimate_traffic(task, layout, hardware, memory.parts["parameters"])
    moved = estimate_memory_bytes(task, memory)
    return _described(task, hardware, memory, estimate_flops(task), sent, moved, None)


def _described(
    task: Task,
    hardware: Hardware,
    memory: Memory,
    executed: float,
    sent: Traffic,
    moved: float,
    compiled: Compiled | None,
) -> Plan:
    chip, refused = hardware.chip, compiled is not None and compiled.refused
    bound = roofline(chip, executed / hardware.size, moved, sent)
    shape = dict(zip(("data", "fsdp", "tensor"), task.mesh.shape(hardware.size), strict=True))
    own: dict[str, Any] = {
        "experiment": task.experiment.name,
        "step": task.kind,
        "hardware": str(hardware),
        "chips": hardware.size,
        "mesh": shape | {"rules": task.mesh.rules},
        "remat": task.model.remat,
        "sequences": task.batch_size,
        "seq_len": task.seq_len,
        "microbatches": task.experiment.train.microbatches if task.kind == "train" else 1,
        "tokens_per_step": task.tokens,
        "memory": {
            **{name: size for name, size in memory.parts.items() if size},
            "padding": memory.padding,
            "temporary": memory.temporary,
            "program": memory.program,
            "total": memory.total,
            "available": round(chip.memory),
            "fits": not refused and memory.total <= chip.memory,
        },
        "flops": {"model": task.model_flops, "executed": executed},
        "bytes": {
            "memory": None if refused else moved,
            "links": None if refused else sent.links,
            "network": None if refused else sent.network,
            "by_kind": sent.by_kind,
        },
        "seconds": None,
    }
    if not refused:
        own |= _speed(task, hardware, bound)
    if compiled is not None:
        own["flops"]["xla_per_chip"] = compiled.flops
    made = None if compiled is None else {"seconds": compiled.seconds, "refused": refused}
    return own | {"compiled": made, "versions": versions(), "commit": commit()}


def _speed(task: Task, hardware: Hardware, bound: Roofline) -> Plan:
    rate = task.tokens / bound.step
    own: Plan = {
        "seconds": {
            **bound._asdict(),
            "step": bound.step,
            "one_after_another": bound.one_after_another,
        },
        "bound": bound.bound,
        "mfu": task.model_flops / (bound.step * hardware.chip.flops * hardware.size),
        "tokens_per_s": rate,
        "tokens_per_s_one_after_another": task.tokens / bound.one_after_another,
        "tokens_per_day": rate * SECONDS_A_DAY,
    }
    if task.kind == "train" and task.experiment.tokens is not None:
        own["run"] = {
            "tokens": task.experiment.tokens,
            "days": task.experiment.tokens / rate / SECONDS_A_DAY,
        }
    if task.kind == "teacher":
        own["shards"] = _shards(task)
    return own


def _shards(task: Task) -> dict[str, float]:
    """Bytes of a token's record before compression (docs/formats.md): 8, and 4 for each id that is
    drawn at least once, of which there cannot be more than draws."""
    job, tokens = task.teacher, None
    if job is not None and job.num_sequences is not None:
        tokens = job.num_sequences * task.seq_len
    elif task.experiment.tokens is not None:
        tokens = task.experiment.tokens
    own: dict[str, float] = {"draws": task.draws, "most_bytes_per_token": 8 + 4 * task.draws}
    if tokens is not None:
        own |= {"tokens": tokens, "most_bytes": tokens * own["most_bytes_per_token"]}
    return own


def short(one: Plan) -> str:
    """A variant in a few words."""
    mesh = one["mesh"]
    axes = " ".join(f"{name}={mesh[name]}" for name in ("data", "fsdp", "tensor") if mesh[name] > 1)
    cut = f", {one['microbatches']} microbatches" if one["microbatches"] > 1 else ""
    return f"{mesh['rules']} {axes or 'one chip'}, remat {one['remat']}{cut}"
