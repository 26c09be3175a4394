"""The whole mission once, on real text: tokenizer, data, teacher, shards, two students, a verdict.

Everything it does is described by an experiment file whose SWEEP has a point `scratch` and a point
`distilled`; this module runs that sweep and sums it up.
"""

import time
from pathlib import Path
from typing import Any

from gemma_jax.completion import complete
from gemma_jax.distill.objective import Distill
from gemma_jax.distill.shards import TeacherShards
from gemma_jax.errors import UserError
from gemma_jax.experiment import Experiment, TeacherRun, run
from gemma_jax.files import write_json
from gemma_jax.generation.sampling import Sampling
from gemma_jax.hosts import is_first
from gemma_jax.runs import read_result
from gemma_jax.sweep import Sweep, run_sweep

FILE = Path(__file__).parent.parent / "experiments" / "quickstart.py"
_PROMPTS = ("def ", "import ", "The ", "class ", "    return ")
_SAMPLE_TOKENS = 48


def default_file() -> Path:
    """The quickstart's experiment file, which lies beside the package in a checkout."""
    if not FILE.exists():
        raise UserError(
            "the quickstart is experiments/quickstart.py of a checkout, and this installation has "
            "none; clone the repository and run ./launch.sh quickstart, or give the file's path."
        )
    return FILE


def quickstart(sweep: Sweep) -> dict[str, Any]:
    """Runs a scratch-against-distilled sweep to its end; also writes `summary.json` in its folder.

    `tokens_per_s` is the scratch student's training speed and `wall_s` the time of this call (an
    earlier, interrupted one is not counted).
    """
    began = time.time()
    teacher, job = _teacher(sweep)
    seed = sweep.seeds[0]
    folders = {
        "teacher": teacher,
        "scratch": sweep.experiment("scratch", seed).folder,
        "distilled": sweep.experiment("distilled", seed).folder,
    }
    run_sweep(sweep)
    if isinstance(job.teacher, Experiment):
        run(job.teacher)  # finished shards do without it, the verdict does not
    results = {name: read_result(folder) or {} for name, folder in folders.items()}
    shards = TeacherShards.open(job.path).manifest
    tokens = shards["num_tokens"]
    summary = {
        "bits_per_byte": {name: result["bits_per_byte"] for name, result in results.items()},
        "shard_bytes_per_token": shards["bytes"] / tokens,
        "unique_ids_per_token": shards["unique_ids"] / tokens,
        "tokens_per_s": results["scratch"]["tokens_per_s"],
        "wall_s": round(time.time() - began, 1),
        "plot": str(sweep.folder / "results.png"),
        "samples": {name: samples(folder) for name, folder in folders.items()},
    }
    if is_first():
        write_json(sweep.folder / "summary.json", summary)
    return summary


def _teacher(sweep: Sweep) -> tuple[Path, TeacherRun]:
    if not {"scratch", "distilled"} <= set(sweep.points):
        raise UserError(
            f"the sweep has points {sorted(sweep.points)}; a quickstart needs 'scratch' and "
            "'distilled'."
        )
    objective = sweep.experiment("distilled", sweep.seeds[0]).objective
    if not isinstance(objective, Distill) or not isinstance(objective.shards, TeacherRun):
        raise UserError(
            "the point 'distilled' must have objective=Distill(shards=TeacherRun(...))."
        )
    teacher = objective.shards.teacher
    return Path(teacher) if isinstance(teacher, str) else teacher.folder, objective.shards


def samples(folder: str | Path, prompts: tuple[str, ...] = _PROMPTS) -> list[str]:
    """A short continuation of each prompt, the prompt included; the same each time."""
    sampling = Sampling(temperature=0.7, top_k=40)
    texts = complete(folder, prompts, max_new_tokens=_SAMPLE_TOKENS, sampling=sampling)
    return [prompt + text for prompt, text in zip(prompts, texts, strict=True)]


def report(summary: dict[str, Any]) -> str:
    """The summary as text for a terminal."""
    bits = summary["bits_per_byte"]
    lines = ["", "model       bits/byte on held-out text"]
    lines += [f"{name:<12}{value:.4f}" for name, value in bits.items()]
    won = bits["scratch"] - bits["distilled"]
    verdict = "better" if won > 0 else "worse"
    lines += [
        f"distilled is {abs(won):.4f} bits/byte {verdict} than scratch, same tokens and steps",
        "",
        f"training speed   {summary['tokens_per_s'] or 0:,.0f} tokens/s (student)",
        f"teacher shards   {summary['shard_bytes_per_token']:.1f} bytes a token, "
        f"{summary['unique_ids_per_token']:.1f} unique ids a token",
        f"wall clock       {summary['wall_s']:.0f} s",
        f"plot             {summary['plot']}",
        "",
    ]
    for name, texts in summary["samples"].items():
        lines.append(f"--- {name} ---")
        lines += [text.rstrip() + "\n" for text in texts[:2]]
    return "\n".join(lines)
