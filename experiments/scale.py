"""What training at scale would need: planned on TPUs, not run (docs/scale.md has the table).

Run     ./launch.sh plan experiments/scale.py --point 270m_16 --topology v5e:4x4
        .venv/bin/python experiments/scale.py      # the whole table, as Markdown
Cost    a compilation of some minutes a line, on any machine with libtpu
Decide  mesh, remat and microbatches, before a slice is rented
Result  docs/scale.md
"""

import dataclasses
import sys

from gemma_jax.distill.objective import Distill
from gemma_jax.experiment import Experiment, TeacherRun
from gemma_jax.model.config import ModelConfig, gemma3_1b, gemma3_4b, gemma3_27b, gemma3_270m
from gemma_jax.sharding import MeshConfig
from gemma_jax.sweep import points
from gemma_jax.training.loop import LoopConfig

# Parameters split over 16 chips and gathered at their use; the rest of a slice repeats that.
MESH = MeshConfig(data=-1, fsdp=16, rules="fsdp")

BASE = Experiment(
    name="scale",
    model=gemma3_270m(),
    data="runs/scale/data",  # a token set with Gemma's tokenizer; a plan does not read it
    tokens=100_000_000_000,
    batch_tokens=524_288,
    seq_len=2048,
    mesh=MESH,
    train=LoopConfig(microbatches=4),
)


def shards(name: str, model: ModelConfig) -> Distill:
    """Targets of a teacher that is split over 32 chips, heads and vocabulary over four of them."""
    teacher = dataclasses.replace(BASE, name=f"scale/{name}", model=model)
    mesh = MeshConfig(data=1, fsdp=8, tensor=4)
    run = TeacherRun(path=f"runs/scale/{name}", teacher=teacher, batch_size=64, mesh=mesh)
    return Distill(shards=run)


POD = {"batch_tokens": 2_097_152, "train.microbatches": 1}  # 256 chips, 4 sequences each

SWEEP = points(
    BASE,
    **{
        "270m_16": {},
        "270m_256": POD,
        "270m_512": POD | {"batch_tokens": 4_194_304},
        "270m_from_4b": {"objective": shards("4b", gemma3_4b())},
        "270m_from_27b": {"objective": shards("27b", gemma3_27b())},
        "270m_32k": {"seq_len": 32_768, "train.microbatches": 1, "model.remat": "full"},
        "1b_256": POD
        | {"model": dataclasses.replace(gemma3_1b(), remat="dots"), "train.microbatches": 2},
        "4b_256": POD | {"model": dataclasses.replace(gemma3_4b(), remat="full")},
    },
)

# (point, step, topology, slices): the lines of the table.
LINES = (
    ("270m_16", "train", "v5e:4x4", 1),
    ("270m_256", "train", "v5e:16x16", 1),
    ("270m_256", "train", "v6e:16x16", 1),
    ("270m_512", "train", "v5e:16x16", 2),
    ("270m_from_27b", "train", "v5e:4x4", 1),
    ("270m_32k", "train", "v5e:4x4", 1),
    ("1b_256", "train", "v5e:16x16", 1),
    ("4b_256", "train", "v6e:16x16", 1),
    ("270m_from_4b", "teacher", "v5p:2x4x4", 1),
    ("270m_from_27b", "teacher", "v5p:2x4x4", 1),
)


def line(found: dict) -> str:
    """A plan as a line of the table."""
    from gemma_jax.plan.run import short

    memory, seconds, sent = found["memory"], found["seconds"], found["bytes"]
    where = f"{memory['total'] / 2**30:.2f} of {memory['available'] / 2**30:.2f}"
    if not memory["fits"] or seconds is None:
        return f"{short(found)} | {where}: does not fit | | | | |"
    parts = " / ".join(
        f"{seconds[name] * 1e3:.0f}" for name in ("compute", "memory", "links", "network")
    )
    return (
        f"{short(found)} | {where} | {found['flops']['executed'] / found['chips'] / 1e12:.1f} | "
        f"{sent['links'] / 1e9:.2f} | {sent['network'] / 1e9:.3f} | {parts} | "
        f"{found['tokens_per_s'] / 1e6:.2f} / {found['tokens_per_s_one_after_another'] / 1e6:.2f} |"
    )


def main() -> None:
    """Compiles what has not been compiled yet and prints the table."""
    import jax

    from gemma_jax.plan.chips import parse_topology
    from gemma_jax.plan.programs import Task
    from gemma_jax.plan.run import plan

    jax.config.update("jax_platforms", "cpu")
    for point, step, topology, slices in LINES:
        task = Task(step, SWEEP.experiment(point, SWEEP.seeds[0]))
        found = plan(task, parse_topology(topology, slices))
        print(f"| {point}, {step} | {found['hardware']} | {line(found)}", flush=True)
    print(f"{found['versions']}, commit {found['commit']}", file=sys.stderr)


if __name__ == "__main__":
    main()
