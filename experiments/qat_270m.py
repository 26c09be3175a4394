"""How much of what rounding to 4 bits costs does quantisation-aware training win back?

Run     ./launch.sh import gemma-3-270m/ runs/gemma
        ./launch.sh sweep experiments/qat_270m.py --arg corpus=PATH/prose_train.jsonl.xz
        Other learning rates, a seed each: --arg rates=1e-5,3e-5,1e-4 --arg name=qat_rates --seeds 0
        A look at all of it on a laptop: --arg corpus=PATH/prose_valid.jsonl --arg name=qat_short
        --arg steps=2 --arg batch_tokens=512 --arg seq_len=256
Tasks   for run in "runs/gemma" "runs/gemma --quantization q4_0" \\
                "runs/qat_270m/lr_3e-05/seed0 --quantization q4_0"; do
            ./launch.sh eval $run --tasks piqa,hellaswag
        done
Cost    under 8 minutes on one H100 (estimated from 100 000 tokens/s): 4.9M tokens of targets from
        the model itself, and three runs of 300 steps of 16 384 tokens on them
Decide  whether the three seeds win back more than half of the loss by rounding
Result  pending

The recipe is that of the Gemma 3 report (arXiv 2503.19786, section 2.3), which takes some 5 000
steps: a finished checkpoint, its own probabilities as targets, here 64 draws a token. The table
(runs/qat_270m/comparison.md, .json) is of the corpus's held-out part: the model in its compute
dtype, its weights rounded and nothing else, and each run's weights rounded. `export
runs/qat_270m/lr_3e-05/seed0 gemma-q4_0.gguf --format gguf --dtype q4_0` writes what was scored.
"""

import math
import statistics
from typing import Any

from gemma_jax import runs
from gemma_jax.data.tokens import Corpus
from gemma_jax.distill.objective import Distill
from gemma_jax.experiment import Experiment, TeacherRun
from gemma_jax.experiment_file import argument
from gemma_jax.files import write_json, write_text
from gemma_jax.model.config import gemma3_270m
from gemma_jax.sweep import Sweep, finished_runs, points
from gemma_jax.trained import evaluate
from gemma_jax.training.loop import LoopConfig
from gemma_jax.training.optim import AdamW, Cosine
from gemma_jax.tuning.qat import Qat

NAME = argument("name", "qat_270m")
INIT = argument("init", "runs/gemma")
STEPS = argument("steps", 300)
BATCH_TOKENS = argument("batch_tokens", 16_384)
SEQ_LEN = argument("seq_len", 1024)
RATES = [float(rate) for rate in argument("rates", "3e-5").strip("()").split(",") if rate.strip()]

TEXT = Corpus(
    path=f"runs/{NAME}/data",
    sources=(argument("corpus", "prose_train.jsonl.xz"),),
    tokenizer=f"{INIT}/{runs.TOKENIZER}",
)
TARGETS = TeacherRun(
    path=f"runs/{NAME}/shards",
    teacher=INIT,
    data=TEXT,
    seq_len=SEQ_LEN,
    num_sequences=STEPS * BATCH_TOKENS // SEQ_LEN,
    draws=64,
    batch_size=BATCH_TOKENS // SEQ_LEN,
)
BASE = Experiment(
    name=NAME,
    init=INIT,
    model=gemma3_270m(),
    data=TEXT,
    objective=Distill(shards=TARGETS),
    quantization=Qat(),
    optimizer=AdamW(weight_decay=0.0, schedule=Cosine(warmup=0.1)),
    tokens=STEPS * BATCH_TOKENS,
    batch_tokens=BATCH_TOKENS,
    seq_len=SEQ_LEN,
    train=LoopConfig(eval_every=100, checkpoint_every=1000, keep_best=0),
)
SWEEP = points(
    BASE,
    seeds=(0, 1, 2),
    **{f"lr_{rate:g}": {"optimizer.learning_rate": rate} for rate in RATES},
)


def after(sweep: Sweep) -> str:
    """Scores the model, its rounded weights and all runs alike; the table of them."""

    def score(folder: Any, rounding: Qat | None) -> float:
        found = evaluate(folder, data=TEXT.path, seq_len=SEQ_LEN, quantization=rounding)
        return found["bits_per_byte"]

    whole, plain = score(INIT, None), score(INIT, Qat())
    tuned: dict[str, list[float]] = {}
    for point, experiment, _ in finished_runs(sweep):
        tuned.setdefault(point, []).append(score(experiment.folder, Qat()))
    lines = [
        "| weights | bits/byte | over whole | won back of the loss by rounding |",
        "|---|---|---|---|",
        f"| whole | {whole:.4f} | | |",
        f"| rounded to Q4_0 | {plain:.4f} | {plain - whole:+.4f} | |",
    ]
    for point, values in tuned.items():
        back = [(plain - value) / (plain - whole) for value in values]
        lines.append(
            f"| trained so, {point}, {len(values)} seeds | {_spread(values, '.4f')} "
            f"| {statistics.mean(values) - whole:+.4f} | {_spread(back, '.2f')} |"
        )
    table = "\n".join(lines) + "\n\n± is the standard deviation over seeds.\n"
    write_text(sweep.folder / "comparison.md", table)
    value = {"whole": whole, "rounded": plain, "trained": tuned}
    write_json(sweep.folder / "comparison.json", value)
    return f"{table}\n{sweep.folder}/comparison.md, .json"


def _spread(values: list[float], form: str) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else math.nan
    mean = format(statistics.mean(values), form)
    return mean if math.isnan(deviation) else f"{mean} ± {deviation:{form}}"


AFTER = after
