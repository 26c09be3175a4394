"""Runs jobs in mlx-lm: `python run_mlx.py JOBS.json`.

A job is {"model": folder, "tokens": [[id, ...], ...], "out": folder}. For text i it writes
out/logits_i.npy [T, V]. Knows nothing of gemma_jax.
"""

import json
import sys
from importlib import metadata
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.utils import load_model


def run(job: dict) -> None:
    model, _ = load_model(Path(job["model"]))
    out = Path(job["out"])
    out.mkdir(parents=True, exist_ok=True)
    for i, ids in enumerate(job["tokens"]):
        logits = model(mx.array([ids]))[0].astype(mx.float32)
        np.save(out / f"logits_{i}.npy", np.array(logits))


def main() -> None:
    print(f"mlx-lm {metadata.version('mlx-lm')}, mlx {metadata.version('mlx')}")
    mx.set_default_device(mx.cpu)
    for job in json.loads(Path(sys.argv[1]).read_text()):
        run(job)


if __name__ == "__main__":
    main()
