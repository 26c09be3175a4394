"""A step's memory and time by arithmetic alone: which variants are worth compiling, and the only
figures there are of devices that nothing here compiles for.

Parameters, optimizer and batch are exact. Activations are counted as tensors of a block that the
backward pass reads, in the compute dtype; the head holds three chunks of logits and the table's
gradient. It is a guide: what is compiled says how far off it was.
"""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType

from gemma_jax.model.cache import cache_bytes
from gemma_jax.plan.chips import Hardware
from gemma_jax.plan.memory import Memory, part_bytes
from gemma_jax.plan.programs import Task, parts_of
from gemma_jax.plan.roofline import Traffic
from gemma_jax.sharding import MESH_AXES, PRESETS, Layout, ShardingRules

# Tokens that the head takes at once, and their logits at most (`ops/vocab_loss.py`).
_CHUNK_TOKENS, _CHUNK_LOGITS = 4096, 2**28
_RECOMPUTED = {"none": 1.0, "dots": 1.05, "full": 4 / 3}  # FLOPs, beside those of the model


def abstract_layout(task: Task, hardware: Hardware) -> Layout:
    """The layout of a task on devices of which nothing but the number is known."""
    shape = task.mesh.shape(hardware.size)
    mesh = AbstractMesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
    return Layout(mesh, PRESETS[task.mesh.rules])  # type: ignore[arg-type]


def estimate_memory(task: Task, layout: Layout) -> Memory:
    # What a step is given does not depend on what it recomputes, or in how many parts.
    experiment = dataclasses.replace(
        task.experiment,
        model=dataclasses.replace(task.experiment.model, remat="none"),
        train=dataclasses.replace(task.experiment.train, microbatches=1),
    )
    plain: Any = dataclasses.replace(task, experiment=experiment)
    parts = _parts(plain, layout.mesh, layout.rules)
    if task.kind == "decode":
        parts = parts | {"cache": _cache(task, layout)}
    temporary = sum(_temporaries(task, layout, parts).values())
    return Memory(parts, sum(parts.values()), round(temporary), 0)


@functools.lru_cache(maxsize=256)
def _parts(task: Task, mesh: AbstractMesh, rules: ShardingRules) -> dict[str, int]:
    return part_bytes(parts_of(task, Layout(mesh, rules)))  # type: ignore[arg-type]


def _cache(task: Task, layout: Layout) -> int:
    """Keys and values on one chip: split by sequences, and by kv heads or slots."""
    split = layout.batch_size_multiple
    rows = task.rows // split if task.rows % split == 0 else task.rows
    return rows * sum(cache_bytes(task.model, task.seq_len)) // _tensor(layout)


def _temporaries(task: Task, layout: Layout, parts: dict[str, int]) -> dict[str, float]:
    c, split = task.model, _tensor(layout)
    width = jnp.dtype(c.compute_dtype).itemsize
    rows = max(1, task.batch_size // layout.batch_size_multiple)
    if task.kind == "train":
        rows = max(1, rows // task.experiment.train.microbatches)
    tokens = rows * task.seq_len
    D, heads = c.embed_dim, c.head_dim / split
    attention = (c.num_heads * 2 + c.num_kv_heads * 2) * heads
    block = {
        "none": 9 * D + 2 * attention + 4 * c.mlp_dim / split,
        "dots": 4 * D + attention + 2 * c.mlp_dim / split,
        "full": D,
    }
    chunk = min(max(1, _CHUNK_LOGITS * split // c.vocab_size), _CHUNK_TOKENS, tokens)
    logits, table = chunk * c.vocab_size / split, c.vocab_size * D / split
    if task.kind == "teacher":
        return {"block": tokens * block["none"] * width, "head": logits * 8 + table * width}
    if task.kind == "decode":
        return {"head": tokens * c.vocab_size / split * 8}
    keys = max(min(2 * (c.window(x) or task.seq_len), task.seq_len) for x in c.layer_letters)
    return {
        "activations": tokens * c.num_layers * block[c.remat] * width,
        "block": tokens * block["none"] * width,
        "scores": tokens * c.num_heads / split * keys / 4 * 8,
        "gradients": parts["parameters"],
        "head": logits * 10 + table * (4 + width),
    }


def estimate_flops(task: Task) -> float:
    """FLOPs of all chips together, recomputation counted."""
    return task.model_flops * (_RECOMPUTED[task.model.remat] if task.kind == "train" else 1)


def estimate_traffic(task: Task, layout: Layout, hardware: Hardware, stored: int) -> Traffic:
    """Gathered parameters, scattered or summed gradients, and the sums of split matrices. A chip
    stores `stored` bytes of parameters."""
    c = task.model
    data, fsdp, _ = (layout.mesh.shape[axis] for axis in MESH_AXES)
    split, width = _tensor(layout), jnp.dtype(c.compute_dtype).itemsize
    if layout.rules.embed is None:
        data, fsdp = data * fsdp, 1
    whole = stored * fsdp
    train = task.kind == "train"
    turns = task.experiment.train.microbatches if train else 1
    inner = data // hardware.slices
    links = whole * width / 4 * (fsdp - 1) / fsdp * (2 if train else 1) * turns
    network = 0.0
    if train:
        links += whole * (fsdp - 1) / fsdp * turns + 2 * stored * (inner - 1) / inner * turns
        slices = hardware.slices
        network = 2 * stored / inner * (slices - 1) / slices * turns
    tokens = task.tokens / layout.batch_size_multiple
    sums = 4 if train else 2
    links += sums * c.num_layers * 2 * tokens * c.embed_dim * width * (split - 1) / split
    return Traffic(links, network, {})


def estimate_memory_bytes(task: Task, memory: Memory) -> float:
    """Traffic of a chip's memory: what is stored is read, parameters and moments written too."""
    if task.kind == "decode":
        return memory.arguments
    optimizer = sum(memory.parts.get(name, 0) for name in ("parameters", "optimizer", "average"))
    return memory.arguments + optimizer + 3 * memory.temporary


def _tensor(layout: Layout) -> int:
    """Among how many devices the rules split matrices."""
    return layout.mesh.shape["tensor"] if layout.rules.mlp == "tensor" else 1
