"""Query routing: which of six classes is a question of? The answer is JSON.

Run     ./launch.sh import gemma-3-270m/ runs/gemma
        ./launch.sh sweep experiments/tuning/trec.py --arg csv=PATH/trec.csv
Cost    under 5 minutes on one H100 (estimated): four runs of 96 steps of 8 192 tokens, some five
        epochs of 4 700 questions, and 512 held-out ones answered twice by each variant
Decide  whether an adapter or 4-bit weights are within two standard errors of full tuning
Result  pending
Serve   ./launch.sh export runs/tuning/trec/qat/seed0 trec.gguf --format gguf --dtype q4_0
        llama-server -m trec.gguf --jinja --temp 0 --json-schema-file runs/tuning/trec/schema.json

The sweep ends with the table (runs/tuning/trec/comparison.md, .json, .png) and the commands for the
variant that it chose. A look at all of it on a laptop: --arg train=24 --arg test=4 --arg steps=2
--arg batch_tokens=512 --arg seq_len=512.
"""

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from comparison import Task, compare, source, sweep, write_splits

CLASSES = ("description", "entity", "abbreviation", "human", "number", "location")
SCHEMA = {
    "type": "object",
    "properties": {"class": {"enum": list(CLASSES)}},
    "required": ["class"],
    "additionalProperties": False,
}


def conversations(path: Path) -> Iterator[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            answer = json.dumps({"class": CLASSES[int(row["label-coarse"])]})
            yield {"prompt": f"Class of this question? {row['text']}", "completion": answer}


def score(line: Mapping[str, Any], reply: str) -> dict[str, float]:
    """Whether the reply names the class."""
    try:
        said = json.loads(reply)
    except ValueError:
        return {"accuracy": 0.0}
    return {"accuracy": float(said == json.loads(line["completion"]))}


TASK = Task(
    name="trec", schema=SCHEMA, score=score, primary="accuracy", max_new_tokens=16, shots=12
)
if (path := source("csv")) is not None:
    write_splits(TASK, conversations(path))

SWEEP = sweep(TASK)
AFTER = compare(TASK)
