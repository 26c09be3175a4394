"""The steps that can be planned, from an experiment and shapes alone: nothing is read or built."""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from gemma_jax import tuned
from gemma_jax.data.packing import FIELDS
from gemma_jax.distill.objective import Distill
from gemma_jax.distill.records import Record
from gemma_jax.distill.teacher import TeacherJob
from gemma_jax.errors import UserError
from gemma_jax.experiment_config import Experiment, TeacherRun
from gemma_jax.generation.programs import trace_advance
from gemma_jax.generation.sampling import Sampling
from gemma_jax.model.config import ModelConfig, flops_per_token
from gemma_jax.model.transformer import Transformer
from gemma_jax.outline import outline
from gemma_jax.runs import MODEL, read_config, run_and_step
from gemma_jax.sharding import Layout, MeshConfig
from gemma_jax.trained import make_teacher
from gemma_jax.training.loop import Job, jit_step
from gemma_jax.training.step import TrainState, state_like

Kind = Literal["train", "teacher", "decode"]


@dataclasses.dataclass(frozen=True)
class Task:
    """What is planned of an experiment.

    `rows` are the sequences that a decoding step goes on with, in caches of `seq_len` tokens.
    """

    kind: Kind
    experiment: Experiment
    rows: int = 1

    def __post_init__(self) -> None:
        if self.kind == "decode" and self.rows & (self.rows - 1):
            raise UserError(
                f"--rows {self.rows} must be a power of two, as generation pads batches."
            )
        objective = self.experiment.objective
        if self.kind == "teacher" and isinstance(objective, Distill) and self.teacher is None:
            raise UserError(
                f"objective.shards={objective.shards!r} does not say who teaches; plan the "
                "teacher's own experiment, or give a TeacherRun."
            )

    @property
    def teacher(self) -> TeacherRun | None:
        """The job of a distillation's teacher; of another experiment, its own model teaches."""
        objective = self.experiment.objective
        shards = objective.shards if isinstance(objective, Distill) else None
        return shards if isinstance(shards, TeacherRun) else None

    @property
    def model(self) -> ModelConfig:
        job = self.teacher
        if self.kind != "teacher" or job is None:
            return self.experiment.model
        if isinstance(job.teacher, Experiment):
            return job.teacher.model
        return read_config(run_and_step(job.teacher)[0] / MODEL)

    @property
    def mesh(self) -> MeshConfig:
        job = self.teacher
        return job.mesh if self.kind == "teacher" and job else self.experiment.mesh

    @property
    def batch_size(self) -> int:
        """Sequences a step."""
        if self.kind == "decode":
            return self.rows
        job = self.teacher
        return job.batch_size if self.kind == "teacher" and job else self.experiment.batch_size

    @property
    def seq_len(self) -> int:
        job = self.teacher
        own = job.seq_len if self.kind == "teacher" and job else None
        if own is None and job is not None and isinstance(job.teacher, Experiment):
            own = job.teacher.seq_len if self.kind == "teacher" else None
        return own or self.experiment.seq_len

    @property
    def draws(self) -> int:
        """Draws a token of the teacher's targets; the most ids that a token can keep."""
        objective = self.experiment.objective
        shards = objective.shards if isinstance(objective, Distill) else None
        return shards.draws if isinstance(shards, TeacherJob) else TeacherJob(path="").draws

    @property
    def tokens(self) -> int:
        """Tokens a step."""
        return self.rows if self.kind == "decode" else self.batch_size * self.seq_len

    @property
    def model_flops(self) -> int:
        """FLOPs that the model needs for a step (`flops_per_token`): no recomputation."""
        whole = flops_per_token(self.model, self.seq_len) * self.tokens
        if self.kind == "train":
            return whole
        if self.kind == "teacher":
            return whole // 3
        # A new token sees a cache that is full, not half of it.
        matrices = flops_per_token(self.model, 1)
        c = self.model
        keys = sum(min(c.window(x) or self.seq_len, self.seq_len) for x in c.layer_letters)
        return self.rows * (matrices // 3 + 4 * c.num_heads * c.head_dim * keys)


class Traced(NamedTuple):
    """A step, traced for the devices of a layout. `parts` are trees of shapes that say where they
    live, of what it is given."""

    program: Any  # jax.stages.Traced
    layout: Layout
    parts: dict[str, Any]


def trace(task: Task, layout: Layout) -> Traced:
    """The step as the loop, the teacher or the generator would run it."""
    return {"train": _train, "teacher": _teacher, "decode": _decode}[task.kind](task, layout)


def parts_of(task: Task, layout: Layout) -> dict[str, Any]:
    """What a training or teaching step is given, without tracing it."""
    if task.kind != "train":
        return _teacher_parts(task, layout)
    job, frozen = _job(task, layout)
    return _train_parts(task, _state(job), frozen, layout)


def _train(task: Task, layout: Layout) -> Traced:
    job, frozen = _job(task, layout)
    state = _state(job)
    parts = _train_parts(task, state, frozen, layout)
    optimizer = job.optimizer.build(job.axes, job.num_steps)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    with layout.active():
        program = jit_step(job, optimizer, shardings).trace(state, parts["batch"], frozen)
    return Traced(program, layout, parts)


def _job(task: Task, layout: Layout) -> tuple[Job, Any]:
    """The job, and the parameters that it does not train, as shapes."""
    experiment = dataclasses.replace(task.experiment, adapter=None, init=None)
    job, adapter = outline(experiment, layout), task.experiment.adapter
    if adapter is None:
        return job, None
    model = Transformer(experiment.model)
    job = dataclasses.replace(job, **tuned.adapter_parts(adapter, model, experiment.seed))
    return job, tuned.frozen_like(adapter, model, layout)


def _state(job: Job) -> TrainState:
    optimizer = job.optimizer.build(job.axes, job.num_steps)
    ema = job.config.ema_decay is not None
    watch = job.config.on_bad_step
    return state_like(job.layout, job.axes, job.init_params, optimizer, ema=ema, on_bad_step=watch)


def _train_parts(task: Task, state: TrainState, frozen: Any, layout: Layout) -> dict[str, Any]:
    return {
        "parameters": state.params,
        "optimizer": state.opt_state,
        "average": state.ema,
        "frozen": frozen,
        "batch": _batch(task, layout),
    }


def _batch(task: Task, layout: Layout) -> dict[str, Any]:
    """A batch as the loader would place it; of a student with as many ids a token as draws."""
    T = task.seq_len
    row = {name: np.zeros(T, kind) for name, kind in FIELDS.items()}
    if isinstance(task.experiment.objective, Distill):
        none = np.zeros(0, np.float16)
        counts = {"num_targets": row["tokens"], "ids": row["tokens"][:0], "counts": none}
        arrays = {name: row[name] for name in ("tokens", "labels", "segment_ids", "positions")}
        kept = {"label_logprob": none, "entropy": none}
        record = Record(record_index=0, draws=task.draws, **arrays, **counts, **kept)
        row = record.padded(task.draws)
    B = task.batch_size
    return {
        name: jax.ShapeDtypeStruct((B, *x.shape), x.dtype, sharding=layout.batch_sharding())
        for name, x in row.items()
    }


def _teacher(task: Task, layout: Layout) -> Traced:
    parts = _teacher_parts(task, layout)
    job = task.teacher or TeacherJob(path="", batch_size=task.batch_size, mesh=task.mesh)
    teacher = make_teacher(job, Transformer(task.model), parts["parameters"], layout)
    program, batch = teacher.trace(task.seq_len)
    return Traced(program, layout, {**parts, "batch": batch})


def _teacher_parts(task: Task, layout: Layout) -> dict[str, Any]:
    model = Transformer(task.model)
    shapes = model.shapes()
    shardings = layout.shardings(model.axes(), shapes)
    return {
        "parameters": jax.tree.map(
            lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
            shapes,
            shardings,
        )
    }


def _decode(task: Task, layout: Layout) -> Traced:
    program, params, state = trace_advance(
        Transformer(task.model),
        layout,
        rows=task.rows,
        capacity=task.seq_len,
        sampling=Sampling(),
    )
    return Traced(program, layout, {"parameters": params, "cache": state.cache, "state": state[1:]})
