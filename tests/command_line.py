"""A tiny experiment for tests of the command line, and the command as a process of its own."""

import argparse
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import gemma_jax
from gemma_jax.files import compilation_cache

COMPILED = str(compilation_cache())  # before a test moves the user's cache
BUILD = "data build tokens --source good.jsonl --vocab-size 400 --valid-fraction 0.1"

EXPERIMENT = """
from gemma_jax.experiment import Experiment
from gemma_jax.experiment_file import argument
from gemma_jax.model.config import ModelConfig
from gemma_jax.sweep import points
from gemma_jax.training.loop import LoopConfig

BASE = Experiment(
    name=argument("name", "tiny"),
    model=ModelConfig(
        vocab_size=400, embed_dim=16, mlp_dim=32, num_layers=2, num_heads=2, num_kv_heads=1,
        head_dim=8, max_seq_len=64, attn_pattern="LG", sliding_window=8, compute_dtype="float32",
    ),
    data="tokens",
    tokens=argument("tokens", 1024),
    batch_tokens=256,
    seq_len=32,
    valid_tokens=256,
    train=LoopConfig(eval_every=4, checkpoint_every=2),
)
SWEEP = points(BASE, a={}, b={"model.attn_pattern": "L"})
"""


def write_inputs(folder: Path) -> None:
    """The text that BUILD reads, and the experiment as exp.py."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnop", k=draw.randint(2, 7))) for _ in range(300)]
    documents = [" ".join(draw.choices(words, k=120)) for _ in range(60)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in documents)
    (folder / "good.jsonl").write_text(lines)
    (folder / "exp.py").write_text(EXPERIMENT)


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 255]) + data[middle + 1 :]


def edited(**changes: Any) -> Any:
    return lambda data: json.dumps(json.loads(data) | changes).encode()


def without(name: str) -> Any:
    def harm(data: bytes) -> bytes:
        return json.dumps({k: x for k, x in json.loads(data).items() if k != name}).encode()

    return harm


def options_of(parser: argparse.ArgumentParser) -> dict[str, set[str]]:
    """The long options of each of its verbs."""
    (verbs,) = (a.choices for a in parser._actions if isinstance(a.choices, dict))
    return {
        name: {o for a in one._actions for o in a.option_strings if o.startswith("--")} - {"--help"}
        for name, one in verbs.items()
    }


def command(*argv: str) -> list[str]:
    return [sys.executable, "-m", "gemma_jax", *argv]


def environment() -> dict[str, str]:
    """Every program that one process has compiled is there for the next."""
    return os.environ | {
        "PYTHONPATH": str(Path(gemma_jax.__file__).parent.parent),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": COMPILED,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def ended(argv: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(argv, env=environment(), capture_output=True, text=True)
