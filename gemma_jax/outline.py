"""The job of an experiment without its data: what is trained, towards what, by which optimizer.

Nothing is read or built here, and no device is asked for, so the layout may be one of devices that
are not there (`plan`). `experiment.build` adds what the job reads.
"""

import functools
from typing import Any

import grain
import jax

from gemma_jax import tuned
from gemma_jax.errors import UserError
from gemma_jax.experiment_config import Experiment
from gemma_jax.model.config import flops_per_token
from gemma_jax.model.transformer import Transformer
from gemma_jax.settings import to_json
from gemma_jax.sharding import Layout
from gemma_jax.training.loop import Job
from gemma_jax.training.objective import Objective
from gemma_jax.tuning.qat import check_widths, quantized, rounded


def outline(experiment: Experiment, layout: Layout) -> Job:
    """A job with no batches and nothing to evaluate; where epochs decide, of one step."""
    rows, split = experiment.batch_size, layout.batch_size_multiple
    if rows % (split * experiment.train.microbatches):
        raise UserError(
            f"a batch of {rows} sequences (batch_tokens={experiment.batch_tokens} / "
            f"seq_len={experiment.seq_len}) in {experiment.train.microbatches} microbatch(es) does "
            f"not divide by the {split} devices of the mesh's batch axes; change batch_tokens or "
            "mesh."
        )
    model, config = Transformer(experiment.model), experiment.model
    return Job(
        name=experiment.name,
        folder=experiment.folder,
        config=experiment.train,
        layout=layout,
        **_weights(experiment, model, layout),
        objective=build_objective(experiment, None),
        optimizer=experiment.optimizer,
        batches=grain.MapDataset.range(0).to_iter_dataset(),
        batch_size=rows,
        num_steps=experiment.num_steps or 1,
        tokens_per_step=experiment.batch_tokens,
        flops_per_token=flops_per_token(config, experiment.seq_len),
        evaluate=lambda _: {},
        seed=experiment.seed,
        settings=to_json(experiment),
    )


def build_objective(experiment: Experiment, most_documents: int | None) -> Objective:
    """What is minimised, on sequences of which so much is known (`Transformer`)."""
    config = experiment.model
    return experiment.objective.build(
        Transformer(config, most_documents),
        softcap=config.final_softcap,
        backend=config.head_backend,
        logits_dtype=config.head_logits_dtype,
    )


def _weights(experiment: Experiment, model: Transformer, layout: Layout) -> dict[str, Any]:
    """The parts of a `Job` that say what is trained, and where it begins."""
    init, adapter, seed = experiment.init, experiment.adapter, experiment.seed
    if init is not None and adapter is not None:
        return tuned.adapted_job(adapter, init, model, layout, experiment.folder, seed)
    axes = model.axes()
    parts: dict[str, Any] = {
        "init_params": lambda: model.init(jax.random.key(seed)),
        "axes": axes,
    }
    if (rounding := experiment.quantization) is not None:
        check_widths(rounding, axes, model.shapes())
        place = jax.jit(functools.partial(quantized, rounding, axes))
        parts["join"] = lambda params, frozen, rng: place(params)
        if rounding.from_rounded and init is None:
            raise UserError("quantization.from_rounded is about given weights; give init=RUN.")
    if init is not None:

        def load(shardings: Any) -> Any:
            params = tuned.load_params(init, model.config, shardings)
            if rounding is not None and rounding.from_rounded:
                params = rounded(rounding, axes, params)
            return params

        parts["load_params"] = load
    return parts
