"""What training at scale would need: planned on TPUs, not run (docs/scale.md has the table).

Run     ./launch.sh plan experiments/scale.py --point 270m_16 --topology v5e:4x4
Cost    a compilation of some minutes a point, on any machine with libtpu
Decide  mesh, remat and microbatches, before a slice is rented
Result  docs/scale.md
"""

import dataclasses

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
