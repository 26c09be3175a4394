"""A run that is killed again and again ends with the bits of one that never was."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from command_line import environment, write_inputs

from gemma_jax import runs
from gemma_jax.distill.shards import TeacherShards
from gemma_jax.distill.verify import verify_teacher_shards
from gemma_jax.training.metrics import read_metrics

KILLS, SEED = 20, 1
STEPS = 120  # more than as many starts come to
SPEEDS = ("tokens_per_s", "mfu", "data_wait")

STUDENT = f"""
import dataclasses
from exp import BASE
from gemma_jax.data.tokenizer import TokenizerConfig
from gemma_jax.data.tokens import Corpus
from gemma_jax.distill.objective import Distill
from gemma_jax.experiment_config import TeacherRun
from gemma_jax.training.loop import LoopConfig

corpus = Corpus(
    path="tokens", sources=("good.jsonl",), tokenizer=TokenizerConfig(vocab_size=400),
    valid_fraction=0.1, shard_bytes=4000,
)
TEACHER = dataclasses.replace(
    BASE, name="teacher", data=corpus, tokens=256 * 12,
    model=dataclasses.replace(BASE.model, attn_pattern="L"),
)
shards = TeacherRun(
    path="shards", teacher=TEACHER, draws=16, num_sequences=22, records_per_shard=4
)
BASE = dataclasses.replace(
    TEACHER, name="student", seed=1, tokens=256 * {STEPS}, objective=Distill(shards=shards),
    train=LoopConfig(log_every=2, eval_every=8, checkpoint_every=4),
)
"""


def run(folder: Path, kills: int) -> subprocess.CompletedProcess[str]:
    folder.mkdir()
    write_inputs(folder)
    (folder / "student.py").write_text(STUDENT)
    script = Path(__file__).with_name("killed.py")
    process = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), "student.py", str(kills), str(SEED)],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return process


def records(folder: Path):
    return [{k: x for k, x in line.items() if k not in SPEEDS} for line in read_metrics(folder)]


@pytest.mark.slow
def test_twenty_kills_change_nothing(tmp_path):
    """While text is packed, programs compile, steps run, files are written and renamed."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(whole, 0)
    process = run(killed, KILLS)
    assert len(process.stdout.splitlines()) == KILLS
    for name in ("teacher", "student"):
        assert f"{name}: going on from step" in process.stderr
        ours, theirs = (folder / "runs" / name for folder in (killed, whole))
        assert records(ours) == records(theirs)
        both = (runs.load_model(folder).params for folder in (ours, theirs))
        jax.tree.map(np.testing.assert_array_equal, *both)
    ours, theirs = (folder / "shards" for folder in (killed, whole))
    verify_teacher_shards(ours)
    indices = [TeacherShards.open(ours).raw_record(place).record_index for place in range(22)]
    assert indices == list(range(22))
    assert json.loads((ours / "manifest.json").read_text()) == json.loads(
        (theirs / "manifest.json").read_text()
    )
    for shard in ours.glob("*.arrayrecord"):
        assert shard.read_bytes() == (theirs / shard.name).read_bytes()
