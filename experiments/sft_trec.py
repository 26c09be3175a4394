"""Query routing as JSON: does an adapter teach the 270M as much as full tuning does?

Run     ./launch.sh import gemma-3-270m-it/ runs/gemma
        ./launch.sh sweep experiments/sft_trec.py --arg csv=PATH/trec.csv
Serve   ./launch.sh export runs/sft_trec/lora/seed0 trec.gguf --format gguf --dtype q8_0
Cost    9 runs of two epochs over 5 400 short questions, on one GPU
Decide  whether LoRA and QLoRA are within two standard errors of full tuning (valid/right)
Result  pending
"""

import csv
import json
from pathlib import Path

from gemma_jax.data.conversations import Conversations
from gemma_jax.experiment import Experiment
from gemma_jax.experiment_file import argument
from gemma_jax.files import write_text
from gemma_jax.model.config import gemma3_270m
from gemma_jax.sweep import points
from gemma_jax.training.loop import LoopConfig
from gemma_jax.training.optim import AdamW, Cosine
from gemma_jax.tuning.lora import Lora, QLora
from gemma_jax.tuning.sft import Sft

CLASSES = ("description", "entity", "abbreviation", "human", "number", "location")
FOLDER = Path("runs/sft_trec")
ASK = 'Which class is this question of? Answer as JSON, like {"class": "number"}. Classes: '


def conversation(row: dict[str, str]) -> dict:
    answer = json.dumps({"class": CLASSES[int(row["label-coarse"])]})
    return {"prompt": f"{ASK}{', '.join(CLASSES)}.\n{row['text']}", "completion": answer}


def write_conversations(source: Path) -> None:
    """Every tenth question is held out."""
    with source.open(newline="", encoding="utf-8") as file:
        lines = [json.dumps(conversation(row)) + "\n" for row in csv.DictReader(file)]
    write_text(FOLDER / "valid.jsonl", "".join(lines[::10]))
    write_text(FOLDER / "train.jsonl", "".join(x for i, x in enumerate(lines) if i % 10))


def right(conversation: dict, reply: str) -> dict[str, float]:
    """Whether the reply is JSON, and whether it names the class."""
    try:
        said = json.loads(reply)
    except ValueError:
        return {"json": 0.0, "right": 0.0}
    wanted = json.loads(conversation["completion"])
    return {"json": 1.0, "right": float(said == wanted)}


if (source := Path(argument("csv", "trec.csv"))).exists():
    write_conversations(source)

BASE = Experiment(
    name="sft_trec",
    init=argument("init", "runs/gemma"),
    model=gemma3_270m(),
    data=Conversations(
        sources=(str(FOLDER / "train.jsonl"),), valid=(str(FOLDER / "valid.jsonl"),)
    ),
    objective=Sft(replies=500, max_new_tokens=16, scorer=right),
    optimizer=AdamW(learning_rate=5e-5, weight_decay=0.0, schedule=Cosine(warmup=0.05)),
    epochs=2,
    batch_tokens=4 * 2048,
    seq_len=2048,
    train=LoopConfig(log_every=5, eval_every=50, checkpoint_every=50),
)
SWEEP = points(
    BASE,
    seeds=(0, 1, 2),
    full={},
    lora={"adapter": Lora(rank=16, alpha=32.0), "optimizer.learning_rate": 5e-4},
    qlora={"adapter": QLora(rank=16, alpha=32.0), "optimizer.learning_rate": 5e-4},
)
