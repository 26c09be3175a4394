"""A few numbers of the real model: `python make_real.py JOBS.json`, after run_transformers.py.

JOBS.json holds one job, the texts of `clients/prompts.py` in their order. Of each text it keeps the
mean loss and the eight largest logits at a few positions.
"""

import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from clients.prompts import PROMPTS

TOP, POSITIONS = 8, 4


def main() -> None:
    (job,) = json.loads(Path(sys.argv[1]).read_text())
    values = {}
    for i, (name, ids) in enumerate(zip(PROMPTS, job["tokens"], strict=True)):
        logits = np.load(Path(job["out"]) / f"logits_{i}.npy").astype(np.float64)
        positions = np.unique(np.linspace(0, len(ids) - 1, POSITIONS).astype(int))
        top = np.argsort(-logits[positions], axis=-1)[:, :TOP]
        norm = np.log(np.exp(logits - logits.max()).sum(-1)) + logits.max()
        loss = (norm[:-1] - logits[np.arange(len(ids) - 1), ids[1:]]).mean()
        values[name] = {
            "tokens": len(ids),
            "loss": round(float(loss), 6),
            "positions": positions.tolist(),
            "top_ids": top.tolist(),
            "top_logits": np.take_along_axis(logits[positions], top, -1).round(5).tolist(),
        }
    lines = (f"{json.dumps(name)}: {json.dumps(value)}" for name, value in values.items())
    path = Path(__file__).with_name("real_270m.json")
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
