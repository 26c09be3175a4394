"""The speed of what does not learn: a teacher's job, generation, and the loader alone."""

import dataclasses
import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax

from gemma_jax.bench import inputs
from gemma_jax.bench.config import BenchConfig
from gemma_jax.bench.timing import Row, empty_cache, make_row, repeated, timed
from gemma_jax.bench.training import checked_layout, mean_flops, open_stream, token_set, utilisation
from gemma_jax.data.packing import packed_sequences
from gemma_jax.distill.teacher import TeacherJob, write_teacher_shards
from gemma_jax.errors import UserError
from gemma_jax.generation.decode import Generator
from gemma_jax.generation.sampling import Sampling
from gemma_jax.model.transformer import Transformer
from gemma_jax.trained import make_teacher


def teacher(config: BenchConfig) -> list[Row]:
    """One row: the whole job, from sequences on disk to finished shards on disk, of a model with
    random weights. MFU counts the forward pass, a third of a training step."""
    layout = checked_layout(config)
    with tempfile.TemporaryDirectory() as scratch, layout.active(), empty_cache():
        tokens = token_set(config, Path(scratch))
        sequences = packed_sequences(tokens, "train", config.seq_len, config.seed)
        count = config.batch * config.steps
        if count > len(sequences):
            raise UserError(
                f"--steps {config.steps} x --batch {config.batch} sequences are over the "
                f"{len(sequences)} of {tokens.path}; ask for fewer."
            )
        model = Transformer(config.model, sequences.most_documents())
        params = _random_params(model, layout.shardings(model.axes(), model.shapes()))
        job = TeacherJob(
            path=str(Path(scratch) / "shards"), batch_size=config.batch, seed=config.seed
        )
        runner = make_teacher(job, model, params, layout)

        def write(num_sequences: int) -> None:
            shutil.rmtree(job.path, ignore_errors=True)
            write_teacher_shards(
                runner,
                sequences,
                num_sequences=num_sequences,
                seq_len=config.seq_len,
                vocab_size=config.model.vocab_size,
                teacher_hash="random",
                tokenizer_hash="drawn",
            )

        first, _ = timed(lambda: write(config.batch))
        times = repeated(lambda: write(count), config)
        segments = [sequences.read(range(min(count, len(sequences))))["segment_ids"]]
    row = make_row(config, times, count * config.seq_len, compile_s=first)
    flops = mean_flops(config.model, segments) / 3
    row["mfu"] = utilisation(row, flops, list(layout.mesh.devices.flat))
    return [row]


def decode(config: BenchConfig) -> list[Row]:
    """Two rows: reading prompts (`seconds` are those of all of them), and drawing `steps` tokens a
    row greedily (`seconds` a step). On the first device, as generation is; `compile_s` is the
    first call, from an empty cache."""
    model = Transformer(config.model)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    drawn = inputs.zipf_tokens(config.batch * config.seq_len, config.model.vocab_size, config.seed)
    prompts = drawn.reshape(config.batch, config.seq_len).tolist()
    sampling = Sampling(temperature=0)

    def read() -> Any:
        state = generator.begin(
            prompts,
            capacity=config.seq_len + config.steps,
            seeds=range(config.batch),
            sampling=sampling,
        )
        return jax.block_until_ready(state)

    def both() -> None:
        seconds, state = timed(read)
        reading.append(seconds)
        seconds, _ = timed(
            lambda: generator.advance(state, config.steps, sampling=sampling, stop_ids=())
        )
        drawing.append(seconds)

    reading: list[float] = []
    drawing: list[float] = []
    with empty_cache():
        params = _random_params(model, jax.tree.map(lambda _: device, model.shapes()))
        generator = Generator(model, params)
        both()
        repeated(both, config, f"decode, batch {config.batch}")
    (first_read, *reading), (first_drawn, *drawing) = reading, drawing
    prompt_tokens, new_tokens = config.batch * config.seq_len, config.batch * config.steps
    once = dataclasses.replace(config, steps=1)
    return [
        make_row(once, reading, prompt_tokens, what="prefill", compile_s=first_read),
        make_row(config, drawing, new_tokens, compile_s=first_drawn),
    ]


def data(config: BenchConfig) -> list[Row]:
    """One row: batches from disk, as the loop gets them, with nobody to wait for."""
    with tempfile.TemporaryDirectory() as scratch:
        batches = iter(open_stream(config, Path(scratch))[0])
        for _ in range(config.warmup):
            next(batches)
        times = repeated(lambda: [next(batches) for _ in range(config.steps)], config)
    row = make_row(config, times, config.steps * config.batch * config.seq_len)
    return [row | {"compute_dtype": None, "weights_dtype": None}]


def _random_params(model: Transformer, shardings: Any) -> Any:
    return jax.jit(model.init, out_shardings=shardings)(jax.random.key(0))
