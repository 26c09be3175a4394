"""The one training loop. Pretraining, distillation and tuning differ in what they hand to it."""

import contextlib
import dataclasses
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import optax

from gemma_jax import stops
from gemma_jax.errors import UserError, require_fractions, require_positive
from gemma_jax.hosts import first_alone
from gemma_jax.progress import progress
from gemma_jax.settings import check_types
from gemma_jax.sharding import Layout
from gemma_jax.training.bad_steps import Skip, Stop
from gemma_jax.training.checkpoint import Checkpoints, keep_elsewhere
from gemma_jax.training.clock import Clock
from gemma_jax.training.lookout import INNER, BadSteps, Lookout, Records
from gemma_jax.training.metrics import MetricsLog, read_metrics, summary
from gemma_jax.training.objective import Objective
from gemma_jax.training.optim import Optimizer
from gemma_jax.training.restore import last_good
from gemma_jax.training.retention import BEST_METRIC
from gemma_jax.training.step import (
    Join,
    TrainState,
    everything,
    init_state,
    make_step,
    state_like,
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
    on_bad_step: Stop | Skip = Stop()
    checkpoints: str | None = None  # a folder for them, gs://BUCKET/... say; else the run's own
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
    settings: Any = None  # as JSON: what W&B is told of the run, and its checkpoints say
    is_same: Callable[[Any], bool] = lambda saved: True  # whether such settings are of this run
    load_params: Callable[[Any], Any] | None = None
    load_frozen: Callable[[], Any] = lambda: None
    join: Join = everything
    shard_records: Callable[[int], list[int]] | None = None  # of a batch by its number, from 0

    def made_of(self, step: int) -> Records:
        """The sequences of the run that step `step` reads, and what they are in teacher shards."""
        first = (step - 1) * self.batch_size
        made: Records = {"sequences": list(range(first, first + self.batch_size))}
        if self.shard_records is not None:
            made["records"] = self.shard_records(step - 1)
        return made


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
        plan = prepare(job)
        batches = iter(job.batches)
        first_alone(lambda: keep_elsewhere(job.folder, job.config.checkpoints, job.name))
        state = last_good(job.folder, plan.like, batches, is_same=job.is_same)
        start = 0 if state is None else int(state.step)
        bad = BadSteps(job.folder, start)
        checkpoints = Checkpoints(
            job.folder,
            keep_last=job.config.keep_last,
            keep_best=job.config.keep_best,
            settings=job.settings,
            bad_steps=bad.steps,
        )
        stack.callback(checkpoints.close)
        if state is None:
            state = plan.fresh()
        elif start < job.num_steps and jax.process_index() == 0:
            print(f"{job.name}: going on from step {start}", file=sys.stderr)

        frozen = job.load_frozen()
        records = read_metrics(job.folder)
        measured = any(r["step"] == job.num_steps and BEST_METRIC in r for r in records)
        if start < job.num_steps or not measured:
            log = MetricsLog(job.folder, start, job.config.wandb_project, job.name, job.settings)
            stack.callback(log.close)
            if start < job.num_steps:
                lookout = Lookout(job.name, job.config.on_bad_step, bad, checkpoints, job.made_of)
                parts = _Parts(plan.step, batches, checkpoints, log, lookout)
                state = _run(job, plan.resumed(state), frozen, start, parts)
            else:  # the weights outlived the last line
                log.write(start, _validated(job, state, frozen))
        records = read_metrics(job.folder)
        metrics, best = summary(records), checkpoints.best_step()
        ema = job.config.ema_decay is not None
        return Trained(state.ema if ema else state.params, metrics, best)


class _Parts(NamedTuple):
    """What the steps of a run go through."""

    step: Callable
    batches: grain.DatasetIterator
    checkpoints: Checkpoints
    log: MetricsLog
    lookout: Lookout


@dataclasses.dataclass(frozen=True)
class Plan:
    """The state of a job, before there is one, and its step."""

    like: TrainState  # shapes with shardings
    fresh: Callable[[], TrainState]
    step: Callable
    resumed: Callable[[TrainState], TrainState]


def prepare(job: Job) -> Plan:
    """Allocates nothing; to be called with the layout active."""
    optimizer = job.optimizer.build(job.axes, job.num_steps)
    ema, on_bad_step = job.config.ema_decay is not None, job.config.on_bad_step

    def begin(params: Any) -> TrainState:
        return init_state(params, optimizer, ema=ema, on_bad_step=on_bad_step)

    like = state_like(
        job.layout, job.axes, job.init_params, optimizer, ema=ema, on_bad_step=on_bad_step
    )
    shardings = jax.tree.map(lambda x: x.sharding, like)

    def fresh() -> TrainState:
        if job.load_params is None:
            return jax.jit(lambda: begin(job.init_params()), out_shardings=shardings)()
        own = job.load_params(shardings.params)
        return jax.jit(begin, out_shardings=shardings, donate_argnums=0)(own)

    def resumed(state: TrainState) -> TrainState:
        assert state.watch is not None
        return state._replace(watch=on_bad_step.go_on(state.watch))

    return Plan(like, fresh, jit_step(job, optimizer, shardings), resumed)


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
            on_bad_step=job.config.on_bad_step,
        ),
        donate_argnums=0,
        out_shardings=(shardings, None),
    )


def _run(job: Job, state: TrainState, frozen: Any, start: int, parts: _Parts) -> TrainState:
    config, (step, batches, checkpoints, log, lookout) = job.config, parts
    schedule = job.optimizer.schedule.build(job.optimizer.learning_rate, job.num_steps)
    clock = Clock(job.layout, job.tokens_per_step, job.flops_per_token)
    with (
        progress(job.name, job.num_steps, start=start) as advance,
        stops.requests(start) as asked,
    ):
        for done in range(start + 1, job.num_steps + 1):
            position = batches.get_state()
            batch = clock.wait_for(batches)
            state, metrics = step(state, job.layout.place(batch, job.batch_size), frozen)
            last = done == job.num_steps
            clock.step_done(metrics)
            lookout.note(done, position, metrics)

            values: dict[str, float | None] = {}
            if done % config.log_every == 0 or last:
                lookout.look(state)
                values |= _measured(metrics, done, checkpoints)
                skipped = int(metrics["skipped"])
                values["learning_rate"] = float(schedule(done - 1 - skipped))
                values |= clock.speed() | ({"skipped": skipped} if skipped else {})
            if done % config.eval_every == 0 or last:
                values |= _validated(job, state, frozen)
                clock.restart()
            if values:
                log.write(done, values)
            stopping = asked(done)
            if done % config.checkpoint_every == 0 or last or stopping:
                lookout.look(state)
                _measured(metrics, done, checkpoints)  # what is not finite is not saved
                log.sync()  # a checkpoint never outlives the numbers that came before it
                known = {name: x for name, x in values.items() if x is not None}
                checkpoints.save(state, batches.get_state(), known)
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


def _measured(metrics: Any, step: int, checkpoints: Checkpoints) -> dict[str, float | None]:
    """A step's numbers, fetched from the device; refused where the parameters have gone off. What
    is not finite in a step that was left out is None."""
    told = {name: x for name, x in metrics.items() if name not in INNER}
    values = {name: float(x) for name, x in jax.device_get(told).items()}
    if math.isfinite(values["param_norm"]):
        return {name: x if math.isfinite(x) else None for name, x in values.items()}
    checkpoints.wait()
    raise UserError(
        f"the parameters are no finite numbers at step {step}; the last checkpoint is of step "
        f"{checkpoints.latest_step() or 0}. Lower optimizer.learning_rate, or set "
        "optimizer.clip_norm."
    )


def _note(values: dict[str, Any]) -> str:
    parts = [f"loss {values['loss']:.3f}"] if values.get("loss") is not None else []
    if "valid/bits_per_byte" in values:
        parts.append(f"valid {values['valid/bits_per_byte']:.3f} bits/byte")
    if values.get("tokens_per_s"):
        parts.append(f"{values['tokens_per_s']:,.0f} tokens/s")
    return "  ".join(parts)
