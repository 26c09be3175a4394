"""Other ways to lay a step out: which are worth compiling, and which of them is the best."""

import dataclasses
from typing import Any

from gemma_jax.errors import UserError
from gemma_jax.plan.chips import Hardware
from gemma_jax.plan.estimate import abstract_layout
from gemma_jax.plan.programs import Task
from gemma_jax.plan.run import Plan, estimate, plan, short
from gemma_jax.progress import progress


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
