"""Tuning jobs for transformers, peft and bitsandbytes: `python run_tuning.py JOBS.json`.

Each job is one of

- {"model", "adapter", "tokens", "out"}: logits of peft's adapter on the model, unmerged and merged;
- {"model", "make", "tokens", "out"}: a random adapter of the settings `make`, saved to out/adapter,
  and the logits of that;
- {"tokenizer", "conversations", "out"}: ids and the assistant's mask of each conversation;
- {"values", "out"}: a matrix in NF4 with double quantisation, its parts and what they give back.

Knows nothing of gemma_jax.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model


def load(folder: str) -> torch.nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def save_logits(model: torch.nn.Module, tokens: list, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    with torch.inference_mode():
        for i, ids in enumerate(tokens):
            logits = model(torch.tensor([ids]), use_cache=False).logits[0]
            np.save(out / f"logits_{i}.npy", logits.numpy())


def use(job: dict, out: Path) -> None:
    model = PeftModel.from_pretrained(load(job["model"]), job["adapter"])
    save_logits(model, job["tokens"], out)
    if job.get("merge", True):
        save_logits(model.merge_and_unload(), job["tokens"], out / "merged")


def make(job: dict, out: Path) -> None:
    torch.manual_seed(0)
    model = get_peft_model(load(job["model"]), LoraConfig(task_type="CAUSAL_LM", **job["make"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.05)
        if job["make"].get("ensure_weight_tying"):
            table, head = (
                model.get_base_model().model.embed_tokens,
                model.get_base_model().lm_head,
            )
            head.lora_A.default.weight.copy_(table.lora_embedding_B.default.T)
            head.lora_B.default.weight.copy_(table.lora_embedding_A.default.T)
    model.eval()
    model.save_pretrained(out / "adapter")
    # As peft reads it: its file has patterns in another order, and the first that fits counts.
    save_logits(PeftModel.from_pretrained(load(job["model"]), out / "adapter"), job["tokens"], out)


def chat(job: dict, out: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(job["tokenizer"])
    found = []
    for messages in job["conversations"]:
        row = tokenizer.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True
        )
        found.append({"ids": row["input_ids"], "mask": row["assistant_masks"]})
    out.mkdir(parents=True, exist_ok=True)
    (out / "chats.json").write_text(json.dumps(found))


def nf4(job: dict, out: Path) -> None:
    from bitsandbytes import functional

    out.mkdir(parents=True, exist_ok=True)
    values = torch.tensor(np.load(job["values"]))
    codes, state = functional.quantize_4bit(
        values, blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    np.savez(
        out / "nf4.npz",
        codes=codes.numpy().ravel(),
        levels=state.code.numpy(),
        scales=state.absmax.numpy(),
        scale_levels=state.state2.code.numpy(),
        scale_scales=state.state2.absmax.numpy(),
        offset=state.offset.numpy(),
        values=functional.dequantize_4bit(codes, state).numpy(),
    )


def main() -> None:
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    kinds = {"adapter": use, "make": make, "tokenizer": chat, "values": nf4}
    for job in json.loads(Path(sys.argv[1]).read_text()):
        (kind,) = kinds.keys() & job.keys()
        kinds[kind](job, Path(job["out"]))


if __name__ == "__main__":
    main()
