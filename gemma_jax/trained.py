"""What one does with a trained run: score text and tasks, let it teach."""

import importlib.util
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gemma_jax import claims, runs
from gemma_jax.data.mixture import check_same_tokenizer
from gemma_jax.data.packing import packed_sequences
from gemma_jax.data.tokens import Corpus, TokenSet, build_tokens
from gemma_jax.distill.shard_writer import check_begun
from gemma_jax.distill.shards import JOB, TeacherShards, is_complete
from gemma_jax.distill.teacher import Teacher, TeacherJob, write_teacher_shards
from gemma_jax.distill.verify import verify_teacher_shards
from gemma_jax.errors import UserError
from gemma_jax.eval import sets
from gemma_jax.eval.perplexity import make_evaluation
from gemma_jax.eval.tasks import limited, run_task
from gemma_jax.files import read_json, write_json
from gemma_jax.hosts import is_first
from gemma_jax.model.transformer import Transformer
from gemma_jax.progress import progress
from gemma_jax.settings import to_json
from gemma_jax.sharding import Layout, MeshConfig, active, chosen_layout, make_layout
from gemma_jax.training.weights import weights_hash
from gemma_jax.tuning.qat import Qat

LESSON = "teacher.json"  # beside the shards of an experiment: the settings of their teacher


def evaluate(
    folder: str | Path,
    *,
    data: str | None = None,
    sources: tuple[str, ...] = (),
    text_field: str = "text",
    seq_len: int | None = None,
    batch_size: int = 8,
    compute_dtype: str | None = None,
    quantization: Qat | None = None,
    mesh: MeshConfig | None = None,
) -> dict[str, float]:
    """Bits per byte, loss, perplexity and accuracy of a run on text (`eval.perplexity`).

    The text is the validation split of the token set `data`, or all of `sources` (files, globs,
    ...: see `data.corpora`). `seq_len` defaults to that of the run's training. `compute_dtype`
    and `quantization` are those of `runs.load_model`. `mesh` splits model and text over devices; by
    default each of them has the model and a share of the text.
    """
    if (data is None) == (not sources):
        raise UserError("give either a token set (--data) or text (--source), and not both.")
    _at_least_one("batch_size", batch_size)
    layout = make_layout(mesh or MeshConfig())
    loaded = runs.load_model(
        folder, layout=layout, compute_dtype=compute_dtype, quantization=quantization
    )
    length = runs.trained_seq_len(folder) if seq_len is None else seq_len
    context = loaded.model.config.max_seq_len
    if not 2 <= length <= context:
        raise UserError(f"seq_len={length} must lie between 2 and the model's context, {context}.")
    with tempfile.TemporaryDirectory() as scratch:
        if data is not None:
            tokens = TokenSet.open(data)
            check_same_tokenizer(tokens, loaded.tokenizer, f"the run {folder}")
        else:
            model_file = Path(scratch) / "tokenizer.model"
            loaded.tokenizer.save(model_file)
            corpus = Corpus(
                path=str(Path(scratch) / "tokens"),
                sources=sources,
                tokenizer=str(model_file),
                text_field=text_field,
                valid_fraction=0.0,
                drop_duplicates=False,
            )
            tokens = build_tokens(corpus)
        measure = make_evaluation(
            loaded.model,
            packed_sequences(tokens, "valid" if data is not None else "train", length, 0),
            loaded.tokenizer.token_bytes(),
            layout,
            batch_size=_multiple(batch_size, layout),
            show_progress=True,
        )
        return measure(loaded.params)


def evaluate_tasks(
    folder: str | Path,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    batch_tokens: int = 8192,
    compute_dtype: str | None = None,
    quantization: Qat | None = None,
    output: str | Path | None = None,
    mesh: MeshConfig | None = None,
) -> dict[str, Any]:
    """Scores of a run, one of its checkpoints or an imported model on tasks.

    Args:
      tasks: names of standard sets (`eval.sets`) or files of JSON lines (`eval.examples`).
      limit: examples of each task at most.
      batch_tokens: tokens at once; more is faster, until the memory is full.
      compute_dtype: "float32" or "bfloat16" instead of the model's own.
      quantization: what the weights are rounded to first.
      output: a JSON file for the result, written anew after each task.
      mesh: splits model and batches over devices; the first device alone by default.

    Returns {"checkpoint", "compute_dtype", "quantization", "limit", "tasks": {name: see
    `eval.tasks.run_task`}}.
    """
    if not tasks:
        raise UserError(f"give at least one task: a file or one of {', '.join(sets.NAMES)}.")
    _at_least_one("limit", 1 if limit is None else limit)
    _at_least_one("batch_tokens", batch_tokens)
    runs.run_and_step(folder)  # refuses what is no run before any set is read
    chosen = [sets.read(name) for name in tasks]
    layout = chosen_layout(mesh)
    loaded = runs.load_model(
        folder, layout=layout, compute_dtype=compute_dtype, quantization=quantization
    )
    model = loaded.model
    output = output if is_first() else None
    result: dict[str, Any] = {
        "checkpoint": str(folder),
        "compute_dtype": model.config.compute_dtype,
        "quantization": quantization and quantization.scheme,
        "limit": limit,
        "tasks": {},
    }
    for task in chosen:
        if output is not None:
            write_json(output, result)
        began = time.monotonic()
        task = replace(task, examples=tuple(limited(task, limit)))
        with active(layout), progress(task.name, len(task.examples)) as advance:
            scores = run_task(
                model,
                loaded.params,
                loaded.tokenizer,
                task,
                batch_tokens=batch_tokens,
                advance=advance,
            )
        result["tasks"][task.name] = {**scores, "seconds": time.monotonic() - began}
    if output is not None:
        write_json(output, result)
    return result


def lm_eval_model(
    folder: str | Path, *, batch_tokens: int = 8192, compute_dtype: str | None = None
) -> Any:
    """The model of a run as an `LM` for lm-evaluation-harness (see `eval.lm_eval`)."""
    if not importlib.util.find_spec("lm_eval"):
        raise UserError("lm-eval is not installed; install gemma-jax[lm-eval].")
    from gemma_jax.eval.lm_eval import GemmaLM

    loaded = runs.load_model(folder, compute_dtype=compute_dtype)
    return GemmaLM(loaded.model, loaded.params, loaded.tokenizer, batch_tokens=batch_tokens)


def write_shards(
    job: TeacherJob,
    folder: str | Path,
    tokens: TokenSet,
    *,
    seq_len: int,
    num_sequences: int | None = None,
) -> dict[str, Any]:
    """Runs the model of a run folder over the training split and writes its targets.

    Returns the manifest of the shards. All of the split is read when `num_sequences` is None.
    """
    layout = make_layout(job.mesh)
    loaded = runs.load_model(folder, layout=layout)
    check_same_tokenizer(tokens, loaded.tokenizer, f"the teacher {folder}")
    context = loaded.model.config.max_seq_len
    if not 2 <= seq_len <= context:
        raise UserError(
            f"seq_len={seq_len} must lie between 2 and the teacher's context, {context}."
        )
    count = count_sequences(tokens, seq_len, num_sequences)
    sequences = packed_sequences(tokens, "train", seq_len, job.seed)
    model = replace(loaded.model, most_documents=sequences.most_documents())
    return write_teacher_shards(
        make_teacher(job, model, loaded.params, layout),
        sequences,
        num_sequences=count,
        seq_len=seq_len,
        vocab_size=loaded.tokenizer.vocab_size,
        teacher_hash=weights_hash(loaded.params),
        tokenizer_hash=loaded.tokenizer.hash,
    )


def count_sequences(tokens: TokenSet, seq_len: int, wanted: int | None) -> int:
    """How many sequences a teacher reads: `wanted`, or all; refuses more than there are."""
    there = len(packed_sequences(tokens, "train", seq_len))
    if wanted is None:
        return there
    _at_least_one("num_sequences", wanted)
    if wanted > there:
        raise UserError(
            f"num_sequences={wanted} is over the {there} sequences of {tokens.path} with "
            f"seq_len={seq_len}; ask for that many at most."
        )
    return wanted


def find_shards(
    job: TeacherJob, lesson: Any, *, seq_len: int, num_sequences: int | None = None
) -> TeacherShards | None:
    """The finished shards of a job, None where there is still some to write.

    `lesson` describes the teacher, as `note_lesson` left it with the shards, so that finished ones
    need their teacher no more. Refuses a folder that was begun for another job or teacher.
    """
    path = Path(job.path)
    names = ("draws", "method", "seed", "records_per_shard")
    wanted = {name: getattr(job, name) for name in names} | {"seq_len": seq_len}
    if num_sequences is not None:
        wanted["num_records"] = num_sequences
    if not check_begun(path, wanted) or not (path / LESSON).exists():
        return None
    saved = read_json(path / LESSON, "the teacher of a folder of shards")
    for name, here, there in claims.conflicts({"teacher": lesson}, saved):
        if name == "teacher.name":  # where it lies is nothing that the targets depend on
            continue
        raise UserError(
            f"{path} holds the targets of a teacher with {name}={there!r}, and this one has "
            f"{here!r}; choose another path, or remove the folder."
        )
    return TeacherShards.open(path) if is_complete(path) else None


def note_lesson(job: TeacherJob, lesson: Any) -> None:
    """Leaves with the shards who teaches, before they are begun."""
    if is_first() and not (Path(job.path) / JOB).exists():
        write_json(Path(job.path) / LESSON, {"teacher": to_json(lesson)})


def verify_shards(
    path: str | Path,
    folder: str | Path | None = None,
    sample: int = 32,
    mesh: MeshConfig | None = None,
) -> dict[str, Any]:
    """Reads all shards again and checks them; with the teacher's run folder, draws a sample of
    records anew, on `mesh`, and compares (`distill.verify`)."""
    _at_least_one("sample", sample)
    if folder is None:
        return verify_teacher_shards(path)
    manifest = TeacherShards.open(path).manifest
    layout = make_layout(mesh or MeshConfig())
    loaded = runs.load_model(folder, layout=layout)
    if weights_hash(loaded.params) != manifest["teacher_hash"]:
        raise UserError(
            f"{folder} is not the teacher of {path}: its weights have another hash; give the run "
            "that wrote the shards."
        )
    job = TeacherJob(
        path=str(path),
        draws=manifest["draws"],
        method=manifest["method"],
        seed=manifest["seed"],
        batch_size=_multiple(8, layout),
    )
    model = replace(loaded.model, most_documents=manifest.get("most_documents"))
    teacher = make_teacher(job, model, loaded.params, layout)
    # A teacher in half precision rounds its probabilities in another way on another device or at
    # another batch size, which moves draws among its rare ids.
    exact = loaded.model.config.compute_dtype == "float32"
    tolerated = 0.01 if exact else 0.5
    return verify_teacher_shards(path, recompute=teacher, sample=sample, tolerated=tolerated)


def make_teacher(job: TeacherJob, model: Transformer, params: Any, layout: Layout) -> Teacher:
    return Teacher(
        job,
        params=params,
        hidden_fn=model.hidden,
        embedding_fn=model.output_embedding,
        softcap=model.config.final_softcap,
        layout=layout,
    )


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise UserError(f"{name}={value} must be at least 1.")


def _multiple(batch_size: int, layout: Layout) -> int:
    """The next batch size that the devices can share."""
    return -(-batch_size // layout.batch_size_multiple) * layout.batch_size_multiple
