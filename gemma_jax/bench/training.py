"""The speed of training, by cross-entropy or from a teacher's shards: the loop's own step, on its
own stream of batches."""

import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np

from gemma_jax.bench import inputs, parts
from gemma_jax.bench.config import BenchConfig
from gemma_jax.bench.timing import (
    Row,
    compile_times,
    empty_cache,
    make_row,
    program_bytes,
    repeated,
    timed,
)
from gemma_jax.data.loader import train_batches
from gemma_jax.data.mixture import Stage
from gemma_jax.data.token_set import TokenSet
from gemma_jax.distill.objective import Distill
from gemma_jax.distill.shards import TeacherShards, shard_stream
from gemma_jax.errors import UserError
from gemma_jax.model.config import ModelConfig, flops_per_token
from gemma_jax.model.transformer import Transformer
from gemma_jax.sharding import Layout, make_layout
from gemma_jax.training.loop import Job, LoopConfig, jit_step
from gemma_jax.training.metrics import peak_flops
from gemma_jax.training.objective import Xent
from gemma_jax.training.optim import AdamW
from gemma_jax.training.step import init_state, state_like

_PROFILED = 3  # steps under the profiler


def train(config: BenchConfig) -> list[Row]:
    """One row. Compilation is timed from an empty cache and from a filled one; then come warm-up,
    the repeats, and a few steps more under the profiler."""
    layout = checked_layout(config)
    with tempfile.TemporaryDirectory() as scratch, layout.active(), empty_cache():
        stream, most_documents = open_stream(config, Path(scratch))
        job = _job(config, layout, Path(scratch), stream, most_documents)
        optimizer = job.optimizer.build(job.axes, job.num_steps)

        def fresh() -> Any:
            return init_state(
                job.init_params(), optimizer, ema=False, on_bad_step=job.config.on_bad_step
            )

        watch = job.config.on_bad_step
        like = state_like(
            layout, job.axes, job.init_params, optimizer, ema=False, on_bad_step=watch
        )
        shardings = jax.tree.map(lambda x: x.sharding, like)
        batches = iter(stream)
        first = layout.place(next(batches), config.batch)
        batch = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), first
        )
        cold, cached, program = compile_times(
            lambda: jit_step(job, optimizer, shardings).lower(like, batch)
        )
        state = jax.jit(fresh, out_shardings=shardings)()
        loop = _Loop(state, program, batches, layout, config.batch)
        loop.run(config.warmup)
        loop.waited, loop.segments = 0.0, []
        times = repeated(lambda: loop.run(config.steps), config)
        waited, segments = loop.waited, loop.segments
        profiled = parts.profile(lambda: loop.run(_PROFILED), program)
    tokens = config.steps * config.batch * config.seq_len
    row = make_row(
        config,
        times,
        tokens,
        documents=round(float(np.mean([ids.max(axis=1).mean() for ids in segments])), 1),
        loss=loop.loss,
        data_wait=waited / sum(times),
        program_bytes=program_bytes(program),
        compile_s=cold,
        compile_cached_s=cached,
        parts=profiled and profiled[0],
        busy=profiled and profiled[1],
    )
    row["mfu"] = utilisation(
        row, mean_flops(config.model, segments), list(layout.mesh.devices.flat)
    )
    return [row]


class _Loop:
    """The inner part of `training.loop`: a batch, to the devices, a step."""

    def __init__(self, state: Any, step: Any, batches: Any, layout: Layout, batch: int) -> None:
        self.state, self.step, self.batches = state, step, batches
        self.layout, self.batch = layout, batch
        self.waited, self.loss = 0.0, float("nan")
        self.segments: list[np.ndarray] = []

    def run(self, steps: int) -> None:
        for _ in range(steps):
            waited, batch = timed(lambda: next(self.batches))
            self.waited += waited
            self.segments.append(batch["segment_ids"])
            self.state, metrics = self.step(self.state, self.layout.place(batch, self.batch))
        self.loss = float(metrics["loss"])  # waits for the last step


def open_stream(config: BenchConfig, scratch: Path) -> tuple[grain.IterDataset, int | None]:
    """The batches that the real loader makes of data that are given or drawn, and how many
    documents a sequence has at most."""
    if config.what == "distill" or config.shards is not None:
        shards = _shards(config, scratch)
        stream = shard_stream(shards, batch_size=config.batch, seed=config.seed)
        return stream, shards.most_documents
    batches = train_batches(
        {"data": token_set(config, scratch)},
        (Stage(until=1.0, weights={"data": 1.0}),),
        seq_len=config.seq_len,
        batch_size=config.batch,
        num_batches=_num_steps(config) + 1,
        seed=config.seed,
    )
    return batches.stream(), batches.most_documents()


def token_set(config: BenchConfig, scratch: Path) -> TokenSet:
    if config.data is None:
        return inputs.draw_token_set(
            scratch / "tokens",
            vocab_size=config.model.vocab_size,
            seq_len=config.seq_len,
            documents=config.documents,
            # A stream goes through them again and again; a teacher reads each once.
            sequences=max(64, config.batch * (config.steps if config.what == "teacher" else 2)),
            seed=config.seed,
        )
    tokens = TokenSet.open(config.data)
    _check_vocabulary(config, tokens.tokenizer.vocab_size, config.data)
    return tokens


def _shards(config: BenchConfig, scratch: Path) -> TeacherShards:
    if config.shards is None:
        return inputs.draw_shards(
            scratch / "shards",
            token_set(config, scratch),
            vocab_size=config.model.vocab_size,
            seq_len=config.seq_len,
            seed=config.seed,
        )
    shards = TeacherShards.open(config.shards)
    _check_vocabulary(config, shards.manifest["vocab_size"], config.shards)
    if shards.seq_len != config.seq_len:
        raise UserError(
            f"{config.shards} holds sequences of {shards.seq_len} tokens; give --seq-len "
            f"{shards.seq_len}."
        )
    return shards


def _check_vocabulary(config: BenchConfig, there: int, where: str) -> None:
    if there > config.model.vocab_size:
        raise UserError(
            f"{where} has {there} ids and the model {config.model.vocab_size}; give "
            f"--set vocab_size={there}."
        )


def _num_steps(config: BenchConfig) -> int:
    return config.warmup + config.repeats * config.steps + _PROFILED


def _job(
    config: BenchConfig,
    layout: Layout,
    folder: Path,
    batches: grain.IterDataset,
    most_documents: int | None,
) -> Job:
    """The job that an experiment of these settings would be."""
    model = Transformer(config.model, most_documents)
    objective = Distill(shards=str(folder)) if config.what == "distill" else Xent()
    return Job(
        name="bench",
        folder=folder,
        config=LoopConfig(microbatches=config.microbatches),
        layout=layout,
        init_params=lambda: model.init(jax.random.key(config.seed)),
        axes=model.axes(),
        objective=objective.build(
            model,
            softcap=config.model.final_softcap,
            backend=config.model.head_backend,
            logits_dtype=config.model.head_logits_dtype,
        ),
        optimizer=AdamW(),
        batches=batches,
        batch_size=config.batch,
        num_steps=_num_steps(config),
        tokens_per_step=config.batch * config.seq_len,
        flops_per_token=flops_per_token(config.model, config.seq_len),
        evaluate=lambda _: {},
        seed=config.seed,
    )


def checked_layout(config: BenchConfig) -> Layout:
    layout = make_layout(config.mesh)
    split = layout.batch_size_multiple
    if config.batch % (split * config.microbatches):
        raise UserError(
            f"--batch {config.batch} in {config.microbatches} microbatch(es) does not divide by "
            f"the {split} devices of the mesh's batch axes; change --batch or --mesh."
        )
    return layout


def mean_flops(config: ModelConfig, segments: Iterable[np.ndarray]) -> float:
    """FLOPs of a training step for each token of batches with these segment ids [B, T].

    A token's are those of `flops_per_token` at the length of its own document, for it sees no
    other: with matrices of P parameters in all, the head of V x D among them once, a document of
    n tokens costs n * 3 * (2 P + 4 * heads * head_dim * sum over layers of mean keys(n)); a query
    of a window W sees W - W (W - 1) / 2 n keys on average, with W = min(window, n), and one of a
    global layer the same with W = n.
    """
    lengths: dict[int, int] = {}
    for ids in segments:
        for row in ids:
            ends = np.flatnonzero(np.diff(row)) + 1
            for length in np.diff([0, *ends.tolist(), len(row)]).tolist():
                lengths[length] = lengths.get(length, 0) + 1
    tokens = sum(length * times for length, times in lengths.items())
    flops = sum(
        length * times * flops_per_token(config, length) for length, times in lengths.items()
    )
    return flops / tokens


def utilisation(row: Row, flops: float, devices: Sequence[Any]) -> float | None:
    """Model FLOPs utilisation (PaLM, arXiv 2204.02311, appendix B): tokens/s x FLOPs a token over
    the dense bf16 peak of all devices; None where that is not known, as on every CPU."""
    peak = peak_flops(devices[0])
    if peak is None:
        return None
    return row["tokens_per_s"]["median"] * flops / (peak * len(devices))
