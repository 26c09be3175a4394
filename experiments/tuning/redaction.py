"""Redaction: the personal data in a message, as a JSON list; code then takes them out.

Run     ./launch.sh import gemma-3-270m/ runs/gemma
        ./launch.sh sweep experiments/tuning/redaction.py
        The messages are made by redaction_data.py, with a seed; --arg data=FOLDER takes the
        train.jsonl, valid.jsonl and test.jsonl of a folder instead.
Cost    under 5 minutes on one H100 (estimated): four runs of 96 steps of 8 192 tokens, and 512
        held-out messages answered twice by each variant
Decide  whether an adapter or 4-bit weights are within two standard errors of full tuning (F1 of
        spans, type and text exact), and how many messages are left with nothing personal in them
Result  pending
Serve   ./launch.sh export runs/tuning/redaction/qat/seed0 redact.gguf --format gguf --dtype q4_0
        llama-server -m redact.gguf --jinja --temp 0 \\
            --json-schema-file runs/tuning/redaction/schema.json

The sweep ends with the table (runs/tuning/redaction/comparison.md, .json, .png) and the commands
for the variant that it chose. See trec.py for a look at it on a laptop. `redact` is what a program
does with a reply.
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import redaction_data  # of this folder
from comparison import Task, compare, span_schema, span_scores, sweep

from gemma_jax.errors import UserError
from gemma_jax.experiment_file import argument
from gemma_jax.files import write_text

MADE = {"train": 4000, "valid": 200, "test": 1000}


def redact(text: str, spans: Sequence[tuple[str, str]]) -> str:
    """The text with each span that was named replaced by its type, as [NAME]; the longest first,
    so that none is torn apart by one inside of it."""
    for kind, span in sorted(spans, key=lambda pair: -len(pair[1])):
        if span:
            text = text.replace(span, f"[{kind.upper()}]")
    return text


def score(line: Mapping[str, Any], reply: str) -> dict[str, float | tuple[float, float]]:
    """F1 of spans; whether the redacted message is `clean` of all that was personal, and `exact`:
    what it should be, to the letter."""
    wanted = [(one["type"], one["text"]) for one in json.loads(line["completion"])]
    scores, said = span_scores(wanted, reply)
    text = redact(line["text"], said)
    left = any(span in text for _, span in wanted)
    exact = text == redact(line["text"], wanted)
    return {**scores, "clean": float(not left), "exact": float(exact)}


TASK = Task(
    name="redaction",
    schema=span_schema(redaction_data.TYPES, most=10),
    score=score,
    primary="f1",
    max_new_tokens=192,
)


def write_splits(folder: Path | None) -> None:
    """Messages of a folder, or those that are made here."""
    for split, limit in TASK.options.limits.items():
        if folder is None:
            rows = redaction_data.messages(MADE[split], 0, split)
            lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        elif not (folder / f"{split}.jsonl").is_file():
            raise UserError(f"--arg data={folder} has no {split}.jsonl; make it anew.")
        else:
            text = (folder / f"{split}.jsonl").read_text("utf-8")
            lines = [line for line in text.split("\n") if line]
        write_text(TASK.file(split), "".join(f"{x}\n" for x in itertools.islice(lines, limit)))


data = argument("data", "")
if data or TASK.options.train or TASK.options.test or not TASK.file("test").exists():
    write_splits(Path(data) if data else None)

SWEEP = sweep(TASK)
AFTER = compare(TASK)
