"""The plan of a step: what each chip would hold and how long it would take at least."""

import dataclasses
from typing import Any

import numpy as np

from gemma_jax.errors import UserError
from gemma_jax.plan.chips import Hardware
from gemma_jax.plan.compiling import Compiled, compile_step, devices_of, versions
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
from gemma_jax.progress import progress
from gemma_jax.runs import commit
from gemma_jax.sharding import make_layout

type Plan = dict[str, Any]


def plan(task: Task, hardware: Hardware) -> Plan:
    """The step of `task` compiled for `hardware`, which has a compiler here: TPUs."""
    devices = devices_of(hardware)
    layout = make_layout(task.mesh, devices)
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


def variants(task: Task, hardware: Hardware) -> list[Task]:
    """The same step laid out, recomputed and cut otherwise: presets of rules with mesh sizes that
    fit, remat, microbatches. The batch stays as it is."""
    found = []
    for mesh in _meshes(task, hardware):
        for remat in ("none", "dots", "full") if task.kind == "train" else (task.model.remat,):
            for k in (1, 2, 4, 8, 16) if task.kind == "train" else (1,):
                one = _changed(task, mesh, remat, k)
                if one is not None:
                    found.append(one)
    return found


def _meshes(task: Task, hardware: Hardware) -> list[dict[str, Any]]:
    slices, each = hardware.slices, hardware.slice_size
    found: list[dict[str, Any]] = [{"data": -1, "fsdp": 1, "tensor": 1, "rules": "dp"}]
    sizes = [n for n in (4, 8, 16, 32, 64, 128, 256) if n < each and each % n == 0] + [each]
    found += [{"data": -1, "fsdp": n, "tensor": 1, "rules": "fsdp"} for n in sizes]
    for tensor in (2, 4, 8, 16):
        rest = each // tensor
        if each % tensor == 0 and task.model.num_heads % tensor == 0 and rest > 1:
            found.append({"data": slices, "fsdp": rest, "tensor": tensor, "rules": "fsdp_tp"})
    return found


def _changed(task: Task, mesh: dict[str, Any], remat: Any, microbatches: int) -> Task | None:
    """None where the batch does not divide so."""
    experiment = task.experiment
    shape = dataclasses.replace(task.mesh, **mesh)
    job = task.teacher
    try:
        if task.kind == "teacher" and job is not None:
            objective: Any = experiment.objective
            shards = dataclasses.replace(job, mesh=shape)
            experiment = dataclasses.replace(
                experiment, objective=dataclasses.replace(objective, shards=shards)
            )
        else:
            experiment = dataclasses.replace(
                experiment,
                mesh=shape,
                model=dataclasses.replace(experiment.model, remat=remat),
                train=dataclasses.replace(experiment.train, microbatches=microbatches),
            )
    except UserError:  # a microbatch would hold part of a sequence
        return None
    return dataclasses.replace(task, experiment=experiment)


def _divides(task: Task, hardware: Hardware) -> bool:
    split = abstract_layout(task, hardware).batch_size_multiple
    k = task.experiment.train.microbatches if task.kind == "train" else 1
    return task.kind == "decode" or task.batch_size % (split * k) == 0


def ranked(task: Task, hardware: Hardware) -> list[tuple[Task, Plan]]:
    """Variants with their estimates: those that fit first, the fastest in front."""
    found = [
        (one, estimate(one, hardware))
        for one in variants(task, hardware)
        if _divides(one, hardware)
    ]
    return sorted(found, key=lambda pair: _order(pair[1]))


def _order(one: Plan) -> tuple[bool, float]:
    # Of what does not fit, the smallest first; the rest by what it takes without overlap, too.
    if not one["memory"]["fits"] or one["seconds"] is None:
        return True, one["memory"]["total"]
    return False, one["seconds"]["step"] + 0.1 * one["seconds"]["one_after_another"]


def search(task: Task, hardware: Hardware, count: int, *, compiles: bool) -> list[Plan]:
    """The `count` variants that look best by arithmetic, compiled, the best first. All of them by
    arithmetic alone where there is no compiler (`compiles` false)."""
    candidates = ranked(task, hardware)
    if not compiles:
        return [found for _, found in candidates[:count]]
    plans = []
    with progress("compiling", min(count, len(candidates))) as advance:
        for one, guess in candidates[:count]:
            found = plan(one, hardware)
            found["estimated_total"] = guess["memory"]["total"]
            plans.append(found)
            advance(1, short(found))
    return sorted(plans, key=_order)


def mend(task: Task, hardware: Hardware, *, tries: int = 3) -> tuple[list[Plan], bool]:
    """Variants of a step that does not fit, compiled until one does: (what was tried, whether the
    last one fits). Nearest to the step first: what changes least of it."""
    fitting = [one for one, guess in ranked(task, hardware) if guess["memory"]["fits"]]
    fitting.sort(key=lambda one: _distance(one, task))
    tried: list[Plan] = []
    with progress("looking for what fits", min(tries, len(fitting))) as advance:
        for one in fitting[:tries]:
            tried.append(plan(one, hardware))
            advance(1, short(tried[-1]))
            if tried[-1]["memory"]["fits"]:
                return tried, True
    return tried, False


def _distance(one: Task, task: Task) -> int:
    """How many settings differ: of two that keep the mesh, the one with less recomputation."""
    a, b = one.experiment, task.experiment
    order = ("none", "dots", "full")
    return (
        10 * (one.mesh != task.mesh)
        + 2 * abs(order.index(a.model.remat) - order.index(b.model.remat))
        + max(0, a.train.microbatches - b.train.microbatches).bit_length()
    )


def short(one: Plan) -> str:
    """A variant in a few words."""
    mesh = one["mesh"]
    axes = " ".join(f"{name}={mesh[name]}" for name in ("data", "fsdp", "tensor") if mesh[name] > 1)
    cut = f", {one['microbatches']} microbatches" if one["microbatches"] > 1 else ""
    return f"{mesh['rules']} {axes or 'one chip'}, remat {one['remat']}{cut}"
