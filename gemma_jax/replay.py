"""One step of a run once more, looked at closely: where does what is not finite come from?"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gemma_jax import claims
from gemma_jax.errors import UserError
from gemma_jax.experiment import build
from gemma_jax.experiment_config import Experiment
from gemma_jax.hosts import fetch
from gemma_jax.model.transformer import Transformer
from gemma_jax.progress import progress
from gemma_jax.training.loop import Job, prepare
from gemma_jax.training.restore import last_good
from gemma_jax.training.step import TrainState, make_gradients


def replay(experiment: Experiment, step: int) -> dict[str, Any]:
    """Runs step `step` from the state before it and with its batch; changes nothing on disk.

    The state is that of the last checkpoint before it, or of the beginning, and the steps between
    are run again. Returns

    - `loss` and `grad_norm`, those of the run to the bit on the same devices;
    - `sequences` and, of teacher shards, `records`: the numbers of what the batch is made of;
    - `gradient_norms` by parameter;
    - `not_finite`: the first `parameter` before the step, the first `activation` on the way through
      the layers (without dropout) and the first `gradient` that is not, None where all are.
    """
    claims.check_claim(experiment.folder, experiment)
    with claims.alone(experiment.folder):
        job = build(experiment)
        if not 1 <= step <= job.num_steps:
            raise UserError(f"--replay {step} is outside of the run's steps, 1 to {job.num_steps}.")
        with job.layout.active():
            return _replay(experiment, job, step)


def _replay(experiment: Experiment, job: Job, step: int) -> dict[str, Any]:
    plan, batches = prepare(job), iter(job.batches)
    state = last_good(job.folder, plan.like, batches, is_same=job.is_same, up_to=step - 1)
    begin = 0 if state is None else int(state.step)
    state = plan.fresh() if state is None else plan.resumed(state)
    frozen = job.load_frozen()
    with progress("steps before", step - 1, start=begin) as advance:
        for _ in range(begin + 1, step):
            state, _ = plan.step(state, job.layout.place(next(batches), job.batch_size), frozen)
            advance(1)
    if int(state.step) != step - 1:
        bad = int(state.step) + 1
        raise UserError(f"the run stops at step {bad}, before step {step}; replay that one.")
    batch = job.layout.place(next(batches), job.batch_size)
    gradients = jax.jit(
        make_gradients(
            job.objective, join=job.join, microbatches=job.config.microbatches, seed=job.seed
        )
    )
    grads, _ = gradients(state.params, frozen, batch, state.step)
    norms = _by_path(jax.jit(lambda tree: jax.tree.map(optax.tree.norm, tree))(grads))
    finite = jax.jit(lambda tree: jax.tree.map(lambda x: jnp.isfinite(x).all(), tree))
    not_finite = {
        "parameter": _first(_by_path(finite(state.params))),
        "activation": _activation(experiment, job, state, frozen, batch),
        "gradient": _first({path: np.isfinite(x) for path, x in norms.items()}),
    }
    _, metrics = plan.step(state, batch, frozen)
    return {
        "name": job.name,
        "step": step,
        "from_step": begin,
        "loss": float(metrics["loss"]),
        "grad_norm": float(metrics["grad_norm"]),
        **job.made_of(step),
        "gradient_norms": norms,
        "not_finite": not_finite,
    }


def _activation(
    experiment: Experiment, job: Job, state: TrainState, frozen: Any, batch: Any
) -> str | None:
    params = job.join(state.params, frozen, None)
    inputs = (batch["tokens"], batch["positions"], batch["segment_ids"])

    def finite(params: Any, *inputs: jax.Array) -> dict[str, jax.Array]:
        walk = Transformer(experiment.model).layers(params, *inputs)
        return {f"{place:03} {name}": jnp.isfinite(x).all() for place, (name, x) in enumerate(walk)}

    found = _first(fetch(jax.jit(finite)(params, *inputs)))
    return None if found is None else found[4:]


def _by_path(tree: Any) -> dict[str, float]:
    """Scalars by the path of their parameter, its names joined by slashes."""
    leaves = jax.tree.leaves_with_path(fetch(tree))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x.item() for path, x in leaves}


def _first(finite: dict[str, Any]) -> str | None:
    return next((name for name, ok in finite.items() if not ok), None)
