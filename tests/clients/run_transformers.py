"""Runs jobs in transformers (float32, eager attention): `python run_transformers.py JOBS.json`.

A job is {"model": folder, "tokens": [[id, ...], ...], "out": folder, "hidden": bool}. For text i
it writes out/logits_i.npy [T, V] and, if asked, out/hidden_i.npy [layers + 1, T, D]: the embedding
and what each layer returns, without the final norm. With "texts": [text, ...] in the place of
"tokens" it writes out/ids.json instead, the ids of each without BOS. Knows nothing of gemma_jax.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers


def run(job: dict) -> None:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        job["model"],
        dtype=torch.float32,
        attn_implementation="eager",
        output_loading_info=True,
    )
    if any(info.get(key) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")):
        raise ValueError(f"tensors of {job['model']} do not fit: {info}")
    if type(model).__name__ != "Gemma3ForCausalLM":
        raise ValueError(f"{job['model']} was loaded as {type(model).__name__}")
    model.eval()
    out = Path(job["out"])
    out.mkdir(parents=True, exist_ok=True)
    states: list[torch.Tensor] = []
    model.model.layers[0].register_forward_pre_hook(lambda _, args: states.append(args[0]))
    for layer in model.model.layers:
        layer.register_forward_hook(
            lambda _, args, result: states.append(
                result[0] if isinstance(result, tuple) else result
            )
        )
    for i, ids in enumerate(job["tokens"]):
        states.clear()
        logits = model(torch.tensor([ids]), use_cache=False).logits[0]
        np.save(out / f"logits_{i}.npy", logits.numpy())
        if job.get("hidden"):
            np.save(out / f"hidden_{i}.npy", torch.stack([s[0] for s in states]).numpy())


def tokenise(job: dict) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(job["model"])
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in job["texts"]]
    out = Path(job["out"])
    out.mkdir(parents=True, exist_ok=True)
    (out / "ids.json").write_text(json.dumps(ids))


def main() -> None:
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    with torch.inference_mode():
        for job in json.loads(Path(sys.argv[1]).read_text()):
            (tokenise if "texts" in job else run)(job)


if __name__ == "__main__":
    main()
