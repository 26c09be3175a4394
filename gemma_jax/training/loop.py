"""The one training loop. Pretraining, distillation and tuning differ in what they hand to it."""

import contextlib
import dataclasses
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
import optax

from gemma_jax import stops
from gemma_jax.errors import UserError, require_fractions, require_positive
from gemma_jax.progress import progress
from gemma_jax.settings import check_types
from gemma_jax.sharding import Layout
from gemma_jax.training.checkpoint import BEST_METRIC, Checkpoints
from gemma_jax.training.metrics import MetricsLog, median, peak_flops, read_metrics
from gemma_jax.training.objective import Objective
from gemma_jax.training.optim import Optimizer
from gemma_jax.training.restore import last_good
from gemma_jax.training.step import (
    Join,
    TrainState,
    everything,
    init_state,
    make_step,
    state_shardings,
)

type Evaluate = Callable[[Any], dict[str, float]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How a run is watched and kept. Intervals are in steps."""

    log_every: int = 10
    eval_every: int = 500
    checkpoint_every: int = 500
    keep_last: int = 2
    keep_best: int = 1
    microbatches: int = 1
    ema_decay: float | None = None
    wandb_project: str | None = None

    def __post_init__(self) -> None:
        check_types(self)
        require_positive(self, "log_every", "eval_every", "checkpoint_every")
        require_positive(self, "keep_last", "microbatches")
        require_positive(self, "keep_best", allow_zero=True)
        require_fractions(self, "ema_decay")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One run, with all its parts in hand.

    `init_params` are the parameters that are trained, in shape and, unless `load_params` gives
    others for their shardings, in value. `load_frozen` gives those that are not trained, and `join`
    makes the model's of both; `axes` are of the trained ones. `batches` yields this host's rows of
    each batch.
    """

    name: str
    folder: Path
    config: LoopConfig
    layout: Layout
    init_params: Callable[[], Any]
    axes: Any
    objective: Objective
    optimizer: Optimizer
    batches: grain.IterDataset
    batch_size: int  # sequences of the global batch
    num_steps: int
    tokens_per_step: int
    flops_per_token: int
    evaluate: Evaluate
    seed: int = 0
    settings: Any = None  # what W&B is told of the run, as JSON
    identity: str | None = None  # another run's checkpoints have another one
    load_params: Callable[[Any], Any] | None = None
    load_frozen: Callable[[], Any] = lambda: None
    join: Join = everything


@dataclasses.dataclass(frozen=True)
class Trained:
    """The end of a run: its weights (the average where one is kept) and its last measurements."""

    params: Any
    metrics: dict[str, float]
    best_step: int | None = None  # of the best checkpoint that is kept


def train(job: Job) -> Trained:
    """Trains to `num_steps`, from the last checkpoint of the folder where there is one.

    Ctrl-C or SIGTERM: finishes the step, saves, raises `Interrupted`, after SIGTERM `Preempted`. A
    resumed run repeats the numbers of an uninterrupted one.
    """
    with job.layout.active(), contextlib.ExitStack() as stack:
        optimizer = job.optimizer.build(job.axes, job.num_steps)
        ema = job.config.ema_decay is not None

        def begin(params: Any) -> TrainState:
            return init_state(params, optimizer, ema=ema)

        shapes = jax.eval_shape(lambda: begin(job.init_params()))
        shardings = state_shardings(job.layout, job.axes, shapes)
        batches = iter(job.batches)
        like = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
        )
        found = last_good(job.folder, like, batches, identity=job.identity)
        checkpoints = Checkpoints(
            job.folder,
            keep_last=job.config.keep_last,
            keep_best=job.config.keep_best,
            identity=job.identity,
        )
        stack.callback(checkpoints.close)
        start = 0
        if found is not None:
            state, start = found, int(found.step)
            if start < job.num_steps and jax.process_index() == 0:
                print(f"{job.name}: going on from step {start}", file=sys.stderr)
        elif job.load_params is not None:
            own = job.load_params(shardings.params)
            state = jax.jit(begin, out_shardings=shardings, donate_argnums=0)(own)
        else:
            state = jax.jit(lambda: begin(job.init_params()), out_shardings=shardings)()

        frozen = job.load_frozen()
        step = jit_step(job, optimizer, shardings)
        records = read_metrics(job.folder)
        measured = any(r["step"] == job.num_steps and BEST_METRIC in r for r in records)
        if start < job.num_steps or not measured:
            log = MetricsLog(job.folder, start, job.config.wandb_project, job.name, job.settings)
            stack.callback(log.close)
            if start < job.num_steps:
                state = _run(job, state, frozen, start, batches, step, checkpoints, log)
            else:  # the weights outlived the last line
                log.write(start, _validated(job, state, frozen))
        records = read_metrics(job.folder)
        metrics, best = _summary(records), checkpoints.best_step()
        return Trained(state.ema if ema else state.params, metrics, best)


def jit_step(job: Job, optimizer: optax.GradientTransformation, shardings: Any) -> Any:
    """The step as the loop runs it: jitted, `(state, batch, frozen) -> (state, metrics)`, with the
    state taken over; `shardings` are the state's."""
    return jax.jit(
        make_step(
            job.objective,
            optimizer,
            join=job.join,
            microbatches=job.config.microbatches,
            ema_decay=job.config.ema_decay,
            seed=job.seed,
            shardings=shardings.params,
        ),
        donate_argnums=0,
        out_shardings=(shardings, None),
    )


def _run(
    job: Job,
    state: TrainState,
    frozen: Any,
    start: int,
    batches: grain.DatasetIterator,
    step: Callable,
    checkpoints: Checkpoints,
    log: MetricsLog,
) -> TrainState:
    config = job.config
    schedule = job.optimizer.schedule.build(job.optimizer.learning_rate, job.num_steps)
    clock = _Clock(job)
    with (
        progress(job.name, job.num_steps, start=start) as advance,
        stops.requests(start) as asked,
    ):
        for done in range(start + 1, job.num_steps + 1):
            batch = clock.wait_for(batches)
            state, metrics = step(state, job.layout.place(batch, job.batch_size), frozen)
            last = done == job.num_steps
            clock.step_done(metrics)

            values: dict[str, float | None] = {}
            if done % config.log_every == 0 or last:
                values |= _measured(metrics, done, checkpoints)
                values["learning_rate"] = float(schedule(done - 1))
                values |= clock.speed()
            if done % config.eval_every == 0 or last:
                values |= _validated(job, state, frozen)
                clock.restart()
            if values:
                log.write(done, values)
            stopping = asked(done)
            if done % config.checkpoint_every == 0 or last or stopping:
                _measured(metrics, done, checkpoints)  # what is not finite is not saved
                log.sync()  # a checkpoint never outlives the numbers that came before it
                known = {name: x for name, x in values.items() if x is not None}
                checkpoints.save(state, batches, known)
                clock.restart()
            advance(1, _note(values) if values else "")
            if stopping:
                checkpoints.wait()
                raise stops.stopped(
                    stopping,
                    f"{job.name} stopped at step {done} of {job.num_steps} and is saved; "
                    "the same command goes on from there.",
                )
        checkpoints.wait()
    return state


def _validated(job: Job, state: TrainState, frozen: Any) -> dict[str, float | None]:
    """The held-out numbers of the weights, of their average where one is kept."""
    trained = state.params if job.config.ema_decay is None else state.ema
    params = job.join(trained, frozen, None)
    return {f"valid/{name}": value for name, value in job.evaluate(params).items()}


class _Clock:
    """Tokens a second, MFU and the share of time spent waiting for data, since the last report.

    The first step (compilation), evaluation and checkpoints are left out.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._first = True
        self.restart()

    def restart(self) -> None:
        self._began, self._steps, self._waited = time.perf_counter(), 0, 0.0

    def wait_for(self, batches: grain.DatasetIterator) -> dict[str, np.ndarray]:
        began = time.perf_counter()
        batch = next(batches)
        self._waited += time.perf_counter() - began
        return batch

    def step_done(self, metrics: Any) -> None:
        self._steps += 1
        if self._first:
            jax.block_until_ready(metrics)
            self._first = False
            self.restart()

    def speed(self) -> dict[str, float | None]:
        """To be called when the last step's numbers have arrived from the device."""
        seconds, steps, waited = time.perf_counter() - self._began, self._steps, self._waited
        self.restart()
        if not steps:
            return {}
        rate = steps * self._job.tokens_per_step / seconds
        peak = peak_flops(self._job.layout.mesh.devices.flat[0])
        mfu = None
        if peak is not None:
            mfu = rate * self._job.flops_per_token / (peak * self._job.layout.mesh.size)
        return {"tokens_per_s": rate, "mfu": mfu, "data_wait": waited / seconds}


def _measured(metrics: Any, step: int, checkpoints: Checkpoints) -> dict[str, float]:
    """A step's numbers, fetched from the device; refused where training has gone off."""
    values = {name: float(x) for name, x in jax.device_get(metrics).items()}
    if all(math.isfinite(values[name]) for name in ("loss", "grad_norm", "param_norm")):
        return values
    checkpoints.wait()
    raise UserError(
        f"the loss is {values['loss']} and the gradient norm {values['grad_norm']} at step {step}; "
        f"the last checkpoint is of step {checkpoints.latest_step() or 0}. Lower "
        "optimizer.learning_rate, or set optimizer.clip_norm."
    )


def _note(values: dict[str, Any]) -> str:
    parts = [f"loss {values['loss']:.3f}"] if "loss" in values else []
    if "valid/bits_per_byte" in values:
        parts.append(f"valid {values['valid/bits_per_byte']:.3f} bits/byte")
    if values.get("tokens_per_s"):
        parts.append(f"{values['tokens_per_s']:,.0f} tokens/s")
    return "  ".join(parts)


def _summary(records: list[dict[str, float]]) -> dict[str, float]:
    """The last value of each metric; speeds as the median over the run."""
    summary: dict[str, float] = {}
    for record in records:
        summary |= record
    for name in ("tokens_per_s", "mfu", "data_wait"):
        value = median(records, name)
        if value is not None:
            summary[name] = value
    return summary
