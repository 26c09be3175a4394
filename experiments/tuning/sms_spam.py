"""Labels for messages: is this SMS spam? The answer is JSON.

Run     ./launch.sh import gemma-3-270m/ runs/gemma
        ./launch.sh sweep experiments/tuning/sms_spam.py --arg csv=PATH/sms_spam.csv
Cost    under 5 minutes on one H100 (estimated): four runs of 96 steps of 8 192 tokens, some five
        epochs of 3 600 messages, and 512 held-out ones answered twice by each variant
Decide  whether an adapter or 4-bit weights are within two standard errors of full tuning (F1 of the
        spam, which is one message in eight)
Result  pending
Serve   ./launch.sh export runs/tuning/sms_spam/qat/seed0 spam.gguf --format gguf --dtype q4_0
        llama-server -m spam.gguf --jinja --temp 0 \\
            --json-schema-file runs/tuning/sms_spam/schema.json

The sweep ends with the table (runs/tuning/sms_spam/comparison.md, .json, .png) and the commands for
the variant that it chose. See trec.py for a look at it on a laptop.
"""

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from comparison import Task, compare, source, sweep, write_splits

LABELS = ("ham", "spam")
SCHEMA = {
    "type": "object",
    "properties": {"label": {"enum": list(LABELS)}},
    "required": ["label"],
    "additionalProperties": False,
}
LONGEST = 1000  # characters; what is longer is several messages run together


def conversations(path: Path) -> Iterator[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if len(row["text"]) > LONGEST:
                continue
            answer = json.dumps({"label": LABELS[int(row["spam"])]})
            yield {"prompt": f"Ham or spam? {row['text'].strip()}", "completion": answer}


def score(line: Mapping[str, Any], reply: str) -> dict[str, float | tuple[float, float]]:
    """Accuracy, and F1 of the spam."""
    wanted = json.loads(line["completion"])
    try:
        said = json.loads(reply)
    except ValueError:
        said = None
    spam = {"label": "spam"}
    return {
        "accuracy": float(said == wanted),
        "f1": (2.0 * (said == wanted == spam), float((said == spam) + (wanted == spam))),
    }


TASK = Task(name="sms_spam", schema=SCHEMA, score=score, primary="f1", max_new_tokens=16)
if (path := source("csv")) is not None:
    write_splits(TASK, conversations(path))

SWEEP = sweep(TASK)
AFTER = compare(TASK)
