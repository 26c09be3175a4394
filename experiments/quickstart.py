"""Does a distilled student beat the same student trained from scratch? Small enough for a laptop.

Run     ./launch.sh quickstart
Cost    under 8 minutes and 4 GB on two CPU cores, everything included
Decide  whether your installation works, end to end
Result  see README.md
"""

import dataclasses

from gemma_jax.data.tokenizer import TokenizerConfig
from gemma_jax.data.tokens import Corpus
from gemma_jax.distill.objective import Distill
from gemma_jax.experiment import Experiment, TeacherRun
from gemma_jax.model.config import ModelConfig
from gemma_jax.sweep import points
from gemma_jax.training.loop import LoopConfig
from gemma_jax.training.optim import AdamW

CORPUS = Corpus(
    path="runs/quickstart/data",
    sources=("stdlib",),
    tokenizer=TokenizerConfig(vocab_size=2048),
    valid_fraction=0.05,
)

STUDENT = ModelConfig(
    vocab_size=2048,
    embed_dim=128,
    mlp_dim=384,
    num_layers=4,
    num_heads=2,
    num_kv_heads=1,
    head_dim=64,
    max_seq_len=1024,
    attn_pattern="LLLG",
    sliding_window=64,
    compute_dtype="float32",
)

BASE = Experiment(
    name="quickstart",
    model=STUDENT,
    data=CORPUS,
    tokens=500_000,
    batch_tokens=2048,
    seq_len=256,
    optimizer=AdamW(learning_rate=4e-3),
    valid_tokens=32_768,
    train=LoopConfig(eval_every=60, checkpoint_every=120),
)

# The student's own architecture, trained longer: on runs this short a small teacher teaches best
# (Gemma 3 report, Figure 8).
TEACHER = dataclasses.replace(BASE, name="quickstart/teacher", tokens=1_250_000)

SHARDS = TeacherRun(path="runs/quickstart/shards", teacher=TEACHER, draws=64, num_sequences=2000)

SWEEP = points(BASE, scratch={}, distilled={"objective": Distill(shards=SHARDS)})
