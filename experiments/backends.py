"""Do the fast kernels learn what the plain paths learn?

Run     ./launch.sh sweep experiments/backends.py --arg corpus=PATH/prose_train.jsonl.xz \\
            --arg tokenizer=runs/gemma/tokenizer.model
        A look on a laptop, where the first and the third are the same program: --arg steps=3
        --arg batch_tokens=512 --arg seq_len=256
Cost    four runs of 200 steps of the 270M, 8 x 2 048 tokens each: some minutes on one H100
Decide  whether the loss curves of `fast` and `float8` are further from `plain` than rounding makes
        that of `plain_unrolled`
Result  pending

`fast` is what is chosen for the hardware; `plain` has attention and the head by way of XLA alone;
`plain_unrolled` the same with its layers written out, which computes the same numbers in another
order: so far apart are curves that differ by rounding. `float8` is `fast` with the head's logits
from operands of eight bits.
"""

import statistics

from gemma_jax.data.tokens import Corpus
from gemma_jax.experiment import Experiment
from gemma_jax.experiment_file import argument
from gemma_jax.files import write_text
from gemma_jax.model.config import gemma3_270m
from gemma_jax.sweep import Sweep, finished_runs, points
from gemma_jax.training.loop import LoopConfig
from gemma_jax.training.metrics import read_metrics
from gemma_jax.training.optim import AdamW

BATCH_TOKENS = argument("batch_tokens", 16_384)
BASE = Experiment(
    name="backends",
    model=gemma3_270m(),
    data=Corpus(
        path="runs/backends/data",
        sources=(argument("corpus", "prose_train.jsonl.xz"),),
        tokenizer=argument("tokenizer", "runs/gemma/tokenizer.model"),
    ),
    tokens=argument("steps", 200) * BATCH_TOKENS,
    batch_tokens=BATCH_TOKENS,
    seq_len=argument("seq_len", 2048),
    optimizer=AdamW(learning_rate=1e-3),
    train=LoopConfig(log_every=1, eval_every=1000, checkpoint_every=1000, keep_best=0),
)
PLAIN = {"model.attn_backend": "banded", "model.head_backend": "xla"}
SWEEP = points(
    BASE,
    plain=PLAIN | {"model.unroll": False},
    plain_unrolled=PLAIN | {"model.unroll": True},
    fast={},
    float8={"model.head_logits_dtype": "float8_e4m3fn"},
)


def after(sweep: Sweep) -> str:
    """How far each curve is from that of `plain`, in nats."""
    curves = {
        point: {one["step"]: one["loss"] for one in read_metrics(run.folder) if "loss" in one}
        for point, run, _ in finished_runs(sweep)
    }
    plain = curves.pop("plain", {})
    lines = [
        "| against plain | mean difference | of absolute ones | largest | last loss |",
        "|---|---|---|---|---|",
    ]
    for point, curve in curves.items():
        apart = [curve[step] - plain[step] for step in curve if step in plain]
        sizes = [abs(x) for x in apart]
        lines.append(
            f"| {point} | {statistics.mean(apart):+.5f} | {statistics.mean(sizes):.5f} "
            f"| {max(sizes):.5f} | {curve[max(curve)]:.4f} |"
        )
    table = "\n".join(lines) + "\n"
    write_text(sweep.folder / "curves.md", table)
    return f"{table}\n{sweep.folder}/curves.md"


AFTER = after
