"""Does distillation pay at real size? A 30M student, alone or taught by a 150M teacher.

Run     ./launch.sh sweep experiments/prose.py --arg corpus=PATH/prose_train.jsonl.xz
Cost    one teacher and 6 students, each four epochs of 74 MB of prose, on one GPU
Decide  whether distilled beats scratch by more than the spread over three seeds
Result  it does: distilled 1.2538, scratch 1.2826 bits/byte; 18 minutes on one H100 (README.md)
"""

import dataclasses

from gemma_jax.data.tokenizer import TokenizerConfig
from gemma_jax.data.tokens import Corpus
from gemma_jax.distill.objective import Distill
from gemma_jax.experiment import Experiment, TeacherRun
from gemma_jax.experiment_file import argument
from gemma_jax.model.config import ModelConfig
from gemma_jax.sweep import points
from gemma_jax.training.loop import LoopConfig
from gemma_jax.training.optim import AdamW

CORPUS = Corpus(
    path="runs/prose/data",
    sources=(argument("corpus", "prose_train.jsonl.xz"),),
    tokenizer=TokenizerConfig(vocab_size=8192),
)

STUDENT = ModelConfig(
    vocab_size=8192,
    embed_dim=512,
    mlp_dim=2048,
    num_layers=8,
    num_heads=4,
    num_kv_heads=1,
    head_dim=128,
    max_seq_len=1024,
    attn_pattern="LLLG",
    sliding_window=128,
)

TEACHER_MODEL = dataclasses.replace(
    STUDENT, embed_dim=1024, mlp_dim=4096, num_layers=10, num_heads=8, num_kv_heads=2
)

# Four epochs of 20.5M tokens; part of a fifth would only be learned by heart.
TOKENS = argument("tokens", 82_100_000)

BASE = Experiment(
    name="prose",
    model=STUDENT,
    data=CORPUS,
    tokens=TOKENS,
    batch_tokens=65_536,
    seq_len=512,
    optimizer=AdamW(learning_rate=2e-3, weight_decay=0.4),
    train=LoopConfig(eval_every=250, checkpoint_every=500),
)

TEACHER = dataclasses.replace(
    BASE,
    name="prose/teacher",
    model=TEACHER_MODEL,
    optimizer=AdamW(learning_rate=1e-3, weight_decay=0.8),
    train=dataclasses.replace(BASE.train, microbatches=2),  # memory: 80 GB cards
)

SHARDS = TeacherRun(path="runs/prose/shards", teacher=TEACHER, draws=64, batch_size=64)

SWEEP = points(BASE, seeds=(0, 1, 2), scratch={}, distilled={"objective": Distill(shards=SHARDS)})
