"""What the pages of this folder share: five ways to a small model for one task, on one test set.

    base       no tuning: examples in the prompt, as plain text
    full       all weights tuned
    lora       an adapter on the base in bfloat16
    qlora      an adapter on the base in NF4
    qat        all weights tuned while they are rounded to Q4_0, from the base's rounded ones

and, with nothing more to train, `full_q4_0`: the weights of `full`, rounded afterwards. A page
describes its `Task`; `sweep` makes the runs of it, `compare` scores them once they are finished:
every held-out reply bound to the task's schema and free. What was scored or exported is kept in the
sweep's folder, and only what is missing or out of date is done again.

`--arg steps=N`, `batch_tokens`, `seq_len`, `train`, `test` (conversations at most) and `init`
change what is done; `--arg export=False` leaves the files for llama.cpp out. comparison_table.py
says how their sizes and speeds get into the table afterwards, on another machine too.
"""

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import comparison_table  # of this folder

from gemma_jax import runs, tuned
from gemma_jax.bench.timing import program_bytes
from gemma_jax.data.conversations import Conversations
from gemma_jax.errors import UserError
from gemma_jax.exchange import export_model
from gemma_jax.experiment import Experiment, build
from gemma_jax.experiment_file import argument
from gemma_jax.files import file_hash, write_json, write_text
from gemma_jax.model.config import gemma3_270m
from gemma_jax.model.transformer import Transformer
from gemma_jax.replied import evaluate_replies
from gemma_jax.sweep import Sweep, finished_runs, points
from gemma_jax.training.loop import LoopConfig, prepare
from gemma_jax.training.optim import AdamW, Cosine
from gemma_jax.tuning.lora import Lora, QLora
from gemma_jax.tuning.qat import Qat
from gemma_jax.tuning.sft import Scorer, Sft

LIMITS = {"train": 5_000, "valid": 200, "test": 512}  # conversations at most


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line may change (`--arg NAME=VALUE`)."""

    init: str
    steps: int
    batch_tokens: int
    seq_len: int
    train: int  # conversations at most; 0 where nothing is said
    test: int
    reply_tokens: int  # of a batch of generation
    export: bool

    @property
    def limits(self) -> dict[str, int]:
        given = {"train": self.train, "test": self.test}
        return {split: given.get(split, 0) or most for split, most in LIMITS.items()}


def options() -> Options:
    return Options(
        init=argument("init", "runs/gemma"),
        steps=argument("steps", 96),
        batch_tokens=argument("batch_tokens", 4 * 2048),
        seq_len=argument("seq_len", 2048),
        train=argument("train", 0),
        test=argument("test", 0),
        reply_tokens=argument("reply_tokens", 524_288),
        export=argument("export", True),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """`schema` is that of a reply, `score` its scorer (`gemma_jax.eval.replies`), `primary` the
    metric to compare by, `shots` the examples in the base model's prompt."""

    name: str
    schema: Mapping[str, Any]
    score: Scorer
    primary: str
    max_new_tokens: int
    shots: int = 8
    options: Options = dataclasses.field(default_factory=options)

    @property
    def folder(self) -> Path:
        return runs.RUNS / "tuning" / self.name

    def file(self, split: str) -> Path:
        return self.folder / f"{split}.jsonl"


def write_splits(task: Task, conversations: Iterable[Mapping[str, Any]]) -> None:
    """Writes train, valid and test. A prompt comes once, and its hash decides where: one in eight
    is for the test, one in sixteen for validation. The hash gives the order too."""
    known = {hashlib.sha256(one["prompt"].encode()).digest(): one for one in conversations}
    splits: dict[str, list[str]] = {"train": [], "valid": [], "test": []}
    for key in sorted(known, key=lambda key: key[1:]):
        split = "test" if key[0] < 32 else "valid" if key[0] < 48 else "train"
        splits[split].append(json.dumps(known[key], ensure_ascii=False) + "\n")
    for split, limit in task.options.limits.items():
        write_text(task.file(split), "".join(splits[split][:limit]))


def source(name: str) -> Path | None:
    """The file that `--arg NAME=PATH` gives; None where it is left out, as once is enough."""
    path = Path(argument(name, ""))
    if path == Path():
        return None
    if not path.is_file():
        raise UserError(f"--arg {name}={path} is no file; give the path of the data.")
    return path


def span_scores(
    wanted: Sequence[tuple[str, str]], reply: str
) -> tuple[dict[str, float | tuple[float, float]], list[tuple[str, str]]]:
    """Precision, recall and F1 of a reply that is a JSON list of {"type", "text"}, over the whole
    set, and the spans that it names. A span counts where type and text are right, as often as it
    is wanted."""
    try:
        given = json.loads(reply)
        said = [(str(one["type"]), str(one["text"])) for one in given]
    except (ValueError, TypeError, KeyError, RecursionError):
        said = []
    hits = float((Counter(wanted) & Counter(said)).total())
    scores: dict[str, float | tuple[float, float]] = {
        "f1": (2 * hits, float(len(wanted) + len(said))),
        "precision": (hits, float(len(said))),
        "recall": (hits, float(len(wanted))),
    }
    return scores, said


def span_schema(types: Sequence[str], most: int) -> dict[str, Any]:
    """The schema of such a list of at most so many spans."""
    span = {
        "type": "object",
        "properties": {"type": {"enum": list(types)}, "text": {"type": "string"}},
        "required": ["type", "text"],
        "additionalProperties": False,
    }
    return {"type": "array", "items": span, "maxItems": most}


def sweep(task: Task) -> Sweep:
    """The runs of a task. As many steps for each of them, so that the programs that one task has
    compiled serve the next."""
    base = Experiment(
        name=f"tuning/{task.name}",
        init=task.options.init,
        model=gemma3_270m(),
        data=Conversations(sources=(str(task.file("train")),), valid=(str(task.file("valid")),)),
        objective=Sft(replies=0),
        optimizer=AdamW(learning_rate=5e-5, weight_decay=0.0, schedule=Cosine(warmup=0.05)),
        tokens=task.options.steps * task.options.batch_tokens,
        batch_tokens=task.options.batch_tokens,
        seq_len=task.options.seq_len,
        train=LoopConfig(log_every=5, eval_every=1000, checkpoint_every=1000, keep_best=0),
    )
    adapter = {"optimizer.learning_rate": 5e-4}
    return points(
        base,
        full={},
        lora={"adapter": Lora(rank=16, alpha=32.0), **adapter},
        qlora={"adapter": QLora(rank=16, alpha=32.0), **adapter},
        qat={"quantization": Qat(from_rounded=True)},
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """A model of the table: where its weights are, and as what they are exported."""

    name: str
    folder: Path
    seed: int = 0
    experiment: Experiment | None = None  # None: nothing was trained for it
    quantization: Qat | None = None
    shots: bool = False

    @property
    def label(self) -> str:
        return f"{self.name}-seed{self.seed}" if self.seed else self.name

    @property
    def dtype(self) -> str:
        return "bf16" if self.quantization is None else "q4_0"


def variants(task_sweep: Sweep) -> Iterator[Variant]:
    base = Path(task_sweep.base.init or "")
    yield Variant(name="base", folder=base, shots=True)
    yield Variant(name="base_q4_0", folder=base, shots=True, quantization=Qat())
    for point, experiment, _ in finished_runs(task_sweep):
        known: dict[str, Any] = {"folder": experiment.folder, "seed": experiment.seed}
        known |= {"experiment": experiment}
        yield Variant(name=point, quantization=experiment.quantization, **known)
        if point == "full":
            yield Variant(name="full_q4_0", quantization=Qat(), **known)


def compare(task: Task) -> Callable[[Sweep], str]:
    """What is done with the finished runs: scores, files, a table and a plot."""

    def after(task_sweep: Sweep) -> str:
        out = task.folder / "compared"
        write_json(task.folder / "schema.json", dict(task.schema))
        rows = []
        for variant in variants(task_sweep):
            row = _scored(task, variant, out)
            if task.options.export:
                _export(variant, task.folder / "gguf")
            if variant.experiment is not None:
                row |= _cost(variant, out)
            rows.append(row)
        return comparison_table.write(rows, task.folder, task.primary, task.folder / "schema.json")

    return after


def _scored(task: Task, variant: Variant, out: Path) -> dict[str, Any]:
    """Both evaluations of a variant, from `out` where they are there."""
    row: dict[str, Any] = {"variant": variant.name, "seed": variant.seed}
    row |= {"label": variant.label, "folder": str(variant.folder), "dtype": variant.dtype}
    loaded = None
    for name, bound in (("bound", True), ("free", False)):
        path = out / f"{variant.label}-{name}.json"
        wanted = {
            "weights": _stamp(variant.folder),
            "test": file_hash(task.file("test")),
            "limit": task.options.limits["test"],
            "schema": task.schema,
            "shots": task.shots if variant.shots else 0,
            "max_new_tokens": task.max_new_tokens,
        }
        known = json.loads(path.read_text()) if path.exists() else {}
        if known.get("of") != wanted:
            loaded = loaded or runs.load_model(variant.folder, quantization=variant.quantization)
            found = evaluate_replies(
                loaded,
                task.file("test"),
                schema=dict(task.schema),
                bound=bound,
                scorer=task.score,
                few_shot=f"{task.file('train')}:{task.shots}" if variant.shots else None,
                prompt_format="text" if variant.shots else "chat",
                limit=task.options.limits["test"],
                max_new_tokens=task.max_new_tokens,
                batch_tokens=task.options.reply_tokens,
                replies=path.with_suffix(".jsonl"),
            )
            known = {"of": wanted, **found}
            write_json(path, known)
        row[name] = known
    return row


def _stamp(folder: Path) -> str:
    """What tells one model of a folder from another: when it was finished."""
    last = folder / runs.RESULT if (folder / runs.RESULT).exists() else folder / runs.MODEL
    return f"{folder} {last.stat().st_mtime_ns}"


def _export(variant: Variant, folder: Path) -> None:
    path, note = folder / f"{variant.label}.gguf", folder / f"{variant.label}.json"
    known = json.loads(note.read_text()) if note.exists() else {}
    if not path.exists() or known.get("weights") != _stamp(variant.folder):
        for old in (path, folder / f"{variant.label}.Modelfile"):
            old.unlink(missing_ok=True)
        export_model(variant.folder, path, format="gguf", dtype=variant.dtype)
        write_json(note, {"weights": _stamp(variant.folder)})


def _cost(variant: Variant, out: Path) -> dict[str, Any]:
    """Minutes of the run, and what its step needs on a device: compiled anew, since the most that a
    process has held tells nothing of one run among several."""
    assert variant.experiment is not None
    path = out / f"{variant.folder.parent.name}-seed{variant.seed}-cost.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    if known.get("weights") != _stamp(variant.folder):
        result = runs.read_result(variant.folder) or {}
        size = _step_bytes(variant.experiment)
        known = {"minutes": result["wall_s"] / 60, "train_tokens_per_s": result["tokens_per_s"]}
        known |= {"step_bytes": size, "weights": _stamp(variant.folder)}
        write_json(path, known)
    return {name: known[name] for name in ("minutes", "train_tokens_per_s", "step_bytes")}


def _step_bytes(experiment: Experiment) -> int | None:
    job, frozen = build(experiment), None
    if experiment.adapter is not None:
        model = Transformer(experiment.model)
        frozen = tuned.frozen_like(experiment.adapter, model, job.layout)
    with job.layout.active():
        plan = prepare(job)
        batch = job.layout.place(next(iter(job.batches)), job.batch_size)
        return program_bytes(plan.step.lower(plan.like, batch, frozen).compile())
