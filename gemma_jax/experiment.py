"""Where the parts of an experiment are put together and run.

`Experiment` and `TeacherRun` (of `experiment_config.py`) describe: the data, teacher and shards
that they name are built on first use, and found again afterwards.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain

from gemma_jax import claims, runs, trained, tuned
from gemma_jax.data.conversations import Conversations
from gemma_jax.data.loader import TextBatches, train_batches
from gemma_jax.data.mixture import Mixture, Stage, check_same_tokenizer, open_sources, open_tokens
from gemma_jax.data.packing import valid_sequences
from gemma_jax.data.tokenizer import Tokenizer
from gemma_jax.data.tokens import Corpus, TokenSet
from gemma_jax.distill.objective import Distill
from gemma_jax.distill.shards import TeacherShards, shard_order, shard_stream
from gemma_jax.distill.teacher import TeacherJob
from gemma_jax.errors import UserError
from gemma_jax.eval.perplexity import make_evaluation
from gemma_jax.experiment_config import Experiment, TeacherRun
from gemma_jax.hosts import first_alone, is_first
from gemma_jax.model.transformer import Transformer
from gemma_jax.ops.hardware import on_gpu
from gemma_jax.outline import build_objective, outline
from gemma_jax.sharding import Layout, make_layout
from gemma_jax.training.loop import Evaluate, Job, train
from gemma_jax.tuning.sft import Sft


def run(experiment: Experiment) -> dict[str, Any]:
    """Trains an experiment to its end and returns its result, also kept as `result.json`.

    Builds what it names first. A finished run returns at once; an interrupted one goes on. A
    folder that holds another experiment is refused.
    """
    claims.check_claim(experiment.folder, experiment)
    finished = runs.read_result(experiment.folder)
    if finished is not None:
        return finished
    with claims.held(experiment.folder) as seconds:
        job = build(experiment)
        claims.claim(experiment.folder, experiment)  # the input is known to be good
        outcome = train(job)
        result = {
            "name": experiment.name,
            "bits_per_byte": outcome.metrics["valid/bits_per_byte"],
            "loss": outcome.metrics["valid/loss"],
            "accuracy": outcome.metrics["valid/accuracy"],
            "tokens": job.num_steps * experiment.batch_tokens,
            "steps": job.num_steps,
            "best_step": outcome.best_step,
            "tokens_per_s": outcome.metrics.get("tokens_per_s"),
            "mfu": outcome.metrics.get("mfu"),
            "wall_s": round(seconds(), 1),
            "metrics": outcome.metrics,
        }
        write = runs.write_result if is_first() else lambda *_: None
        first_alone(lambda: write(experiment.folder, result))
    return result


def finished_result(experiment: Experiment) -> dict[str, Any] | None:
    """The result of a run that is finished; None where it is not, or was of other settings."""
    try:
        claims.check_claim(experiment.folder, experiment)
    except UserError:
        return None
    return runs.read_result(experiment.folder)


def build(experiment: Experiment) -> Job:
    """Everything that the loop needs, with all input checked against all other."""
    layout, model = make_layout(experiment.mesh), Transformer(experiment.model)
    job = outline(experiment, layout)
    _check_teacher(experiment)
    source = (_conversations if isinstance(experiment.data, Conversations) else _texts)(
        experiment, model, layout
    )
    if experiment.init is not None:
        tuned.check_init(experiment.init, experiment.model, source.tokenizer)
    if experiment.init is not None and experiment.adapter is not None:
        runs.open_base(experiment.init)  # refused before work is lost
    if is_first():
        runs.describe_model(experiment.folder, experiment.model, source.tokenizer)
    return dataclasses.replace(
        job,
        batches=source.batches,
        num_steps=source.num_steps,
        evaluate=source.evaluate,
        objective=build_objective(experiment, source.most_documents),
        is_same=lambda saved: not claims.conflicts(experiment, saved),
        shard_records=source.records,
    )


class _Source(NamedTuple):
    """What a run reads, and how it is measured."""

    tokenizer: Tokenizer
    batches: grain.IterDataset
    num_steps: int
    evaluate: Evaluate
    most_documents: int | None  # of a sequence
    records: Callable[[int], list[int]] | None = None  # of a batch, where they come from shards


def _texts(experiment: Experiment, model: Transformer, layout: Layout) -> _Source:
    data, rows = experiment.data, layout.own_rows(experiment.batch_size)
    assert not isinstance(data, Conversations)
    sources = first_alone(lambda: open_sources(data))
    tokenizer = next(iter(sources.values())).tokenizer
    _check_vocabulary(experiment, tokenizer)
    num_steps = experiment.num_steps
    assert num_steps is not None
    evaluate = make_evaluation(
        model,
        valid_sequences(sources.values(), experiment.seq_len, experiment.valid_tokens),
        tokenizer.token_bytes(),
        layout,
        batch_size=experiment.batch_size,
    )
    if isinstance(experiment.objective, Distill):
        shards = prepare_shards(experiment.objective.shards, tokenizer)
        size, seed = experiment.batch_size, experiment.seed
        batches = shard_stream(shards, batch_size=size, seed=seed, rows=rows)
        order = shard_order(shards, batch_size=size, seed=seed)
        known, records = shards.most_documents, lambda batch: order[batch].tolist()
        return _Source(tokenizer, batches, num_steps, evaluate, known, records)
    texts = _batches(experiment, sources, rows)
    known = _if_of_use(texts.most_documents)
    return _Source(tokenizer, texts.stream(), num_steps, evaluate, known)


def _if_of_use(count: Callable[[], int]) -> int | None:
    """Counting goes through all documents; attention asks for it on GPUs alone."""
    return count() if on_gpu() else None


def _conversations(experiment: Experiment, model: Transformer, layout: Layout) -> _Source:
    data, objective = experiment.data, experiment.objective
    assert isinstance(data, Conversations)
    assert isinstance(objective, Sft)
    tokenizer = tuned.tokenizer_of(data, experiment.init)
    _check_vocabulary(experiment, tokenizer)
    lessons = tuned.read_lessons(
        data,
        tokenizer,
        seq_len=experiment.seq_len,
        batch_size=experiment.batch_size,
        num_steps=experiment.num_steps,
        epochs=experiment.epochs,
        seed=experiment.seed,
    )
    evaluate = tuned.make_lesson_evaluation(
        model,
        tokenizer,
        lessons,
        objective,
        layout,
        batch_size=experiment.batch_size,
        valid_tokens=experiment.valid_tokens,
    )
    tuned.check_unchanged(experiment.folder, lessons.conversations)
    batches = lessons.batches(experiment.batch_size, layout.own_rows(experiment.batch_size))
    known = _if_of_use(lambda: lessons.most_documents(experiment.batch_size))
    return _Source(tokenizer, batches, lessons.num_steps, evaluate, known)


def prepare_shards(job: TeacherJob | str, tokenizer: Tokenizer | None = None) -> TeacherShards:
    """The shards of a job, written where they are not yet, of the student's tokenizer."""
    shards = _finished_shards(job)
    if isinstance(job, TeacherRun) and shards is None:
        data, seq_len = _what_it_reads(job)
        tokens = first_alone(lambda: open_tokens(data))
        if tokenizer is not None:
            check_same_tokenizer(tokens, tokenizer, "the data of the student")
        trained.count_sequences(tokens, seq_len, job.num_sequences)
        folder = Path(job.teacher) if isinstance(job.teacher, str) else job.teacher.folder
        if isinstance(job.teacher, Experiment):
            own_data = job.teacher.data
            if not isinstance(own_data, Conversations):
                for own in first_alone(lambda: open_sources(own_data)).values():
                    check_same_tokenizer(tokens, own.tokenizer, "the data of the teacher")
            run(job.teacher)
        trained.note_lesson(job, job.teacher)
        trained.write_shards(job, folder, tokens, seq_len=seq_len, num_sequences=job.num_sequences)
        shards = TeacherShards.open(job.path)
    assert shards is not None
    if tokenizer is not None:
        shards.check_tokenizer(tokenizer.hash)
    return shards


def _finished_shards(job: TeacherJob | str) -> TeacherShards | None:
    """The shards of a job where there is nothing left to write; refuses those of another job."""
    if not isinstance(job, TeacherRun):
        return TeacherShards.open(job if isinstance(job, str) else job.path)
    _, seq_len = _what_it_reads(job)
    shards = trained.find_shards(job, job.teacher, seq_len=seq_len, num_sequences=job.num_sequences)
    # A folder given by its name may hold another run by now: `write_shards` compares the weights.
    by_name = isinstance(job.teacher, str) and Path(job.teacher).exists()
    return None if by_name else shards


def _what_it_reads(job: TeacherRun) -> tuple[Corpus | str, int]:
    """The data and the seq_len of a teacher's job."""
    own = job.teacher if isinstance(job.teacher, Experiment) else None
    data, seq_len = job.data or (own and own.data), job.seq_len or (own and own.seq_len)
    if not isinstance(data, (Corpus, str)) or not seq_len:
        raise UserError(f"the shards at {job.path} need data (one corpus) and seq_len.")
    return data, seq_len


def _check_teacher(experiment: Experiment) -> None:
    """Refuses what cannot fit, before a teacher is trained or shards are written."""
    if not isinstance(experiment.objective, Distill):
        return
    job = experiment.objective.shards
    shards = _finished_shards(job)
    if isinstance(job, TeacherRun) and shards is None:
        _, seq_len = _what_it_reads(job)
        if isinstance(job.teacher, Experiment):
            _check_teacher(job.teacher)
            vocab_size = job.teacher.model.vocab_size
        else:
            vocab_size = runs.read_config(Path(job.teacher) / runs.MODEL).vocab_size
    elif shards is not None:
        seq_len, vocab_size = shards.seq_len, shards.manifest["vocab_size"]
    own = {"seq_len": experiment.seq_len, "model.vocab_size": experiment.model.vocab_size}
    for (name, here), there in zip(own.items(), (seq_len, vocab_size), strict=True):
        if here != there:
            raise UserError(
                f"{name}={here}, but the teacher's shards have {there}; set {name}={there}."
            )


def _check_vocabulary(experiment: Experiment, tokenizer: Tokenizer) -> None:
    own, needed = experiment.model.vocab_size, tokenizer.vocab_size
    # A model from elsewhere may have more rows than its tokenizer has ids.
    if own < needed or (own > needed and experiment.init is None):
        raise UserError(
            f"model.vocab_size={experiment.model.vocab_size}, but the tokenizer of the data has "
            f"{tokenizer.vocab_size} ids; set model.vocab_size={tokenizer.vocab_size}."
        )


def _batches(
    experiment: Experiment, sources: dict[str, TokenSet], rows: Sequence[int]
) -> TextBatches:
    """This process's rows of each batch of text."""
    data, num_steps = experiment.data, experiment.num_steps
    assert num_steps is not None
    whole = (Stage(until=1.0, weights={"data": 1.0}),)
    stages = data.stages if isinstance(data, Mixture) else whole
    return train_batches(
        sources,
        stages,
        seq_len=experiment.seq_len,
        batch_size=experiment.batch_size,
        num_batches=num_steps,
        seed=experiment.seed,
        rows=rows,
    )
