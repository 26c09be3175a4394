"""Entity extraction: the persons, organizations and locations of a contract's sentence, as JSON.

Run     ./launch.sh import gemma-3-270m/ runs/gemma
        ./launch.sh sweep experiments/tuning/ner_finance.py --arg data=PATH/ner_finance.jsonl
Cost    under 5 minutes on one H100 (estimated): four runs of 96 steps of 8 192 tokens, and 142
        held-out sentences answered twice by each variant
Decide  whether an adapter or 4-bit weights are within two standard errors of full tuning (F1 of
        entities, type and text exact)
Result  pending
Serve   ./launch.sh export runs/tuning/ner_finance/qat/seed0 ner.gguf --format gguf --dtype q4_0
        llama-server -m ner.gguf --jinja --temp 0 \\
            --json-schema-file runs/tuning/ner_finance/schema.json

The sweep ends with the table (runs/tuning/ner_finance/comparison.md, .json, .png) and the commands
for the variant that it chose. See trec.py for a look at it on a laptop.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from comparison import (
    Task,
    compare,
    source,
    span_schema,
    span_scores,
    sweep,
    write_splits,
)

TYPES = ("PERSON", "ORGANIZATION", "LOCATION")
ENTITY = re.compile(rf"(.+?) - ({'|'.join(TYPES)})(?:, |$)")


def conversations(path: Path) -> Iterator[dict[str, str]]:
    """The file's answers are texts, `[NAME - TYPE, ...]` or a sentence that there are none."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            found = ENTITY.findall(row["ideal"].removeprefix("[").removesuffix("]"))
            entities = [{"type": kind, "text": text} for text, kind in found]
            yield {
                "prompt": f"Entities in: {row['input'][-1]['content']}",
                "completion": json.dumps(entities, ensure_ascii=False),
            }


def score(line: Mapping[str, Any], reply: str) -> dict[str, float | tuple[float, float]]:
    wanted = [(one["type"], one["text"]) for one in json.loads(line["completion"])]
    return span_scores(wanted, reply)[0]


TASK = Task(
    name="ner_finance",
    schema=span_schema(TYPES, most=20),
    score=score,
    primary="f1",
    max_new_tokens=256,
)
if (path := source("data")) is not None:
    write_splits(TASK, conversations(path))

SWEEP = sweep(TASK)
AFTER = compare(TASK)
