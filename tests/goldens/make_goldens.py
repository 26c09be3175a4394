"""Writes gemma3_tiny.npz: what transformers' Gemma 3 gives for the cases of cases.py.

Runs in an environment of its own (torch, transformers, NumPy; no jax): see README.md.

For each case `NAME`: `NAME/logits` float32 [batch, seq_len, vocab_size], `NAME/loss` (mean
cross-entropy over all labels) and `NAME/grad/PARAMETER` float64 [2] (see weights.probe).
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from cases import CASES, layer_letters
from transformers import AttentionInterface, Gemma3ForCausalLM, Gemma3TextConfig
from transformers.models.gemma3 import modeling_gemma3
from weights import make_tokens, make_weights, probe, shapes

LAYER_TYPES = {"L": "sliding_attention", "G": "full_attention"}


def eager_with_softcap(module, *args, **kwargs):
    """transformers' own eager attention, given the softcap that its Gemma 3 layer leaves out."""
    softcap = module.config.attn_logit_softcapping
    return modeling_gemma3.eager_attention_forward(module, *args, **kwargs, softcap=softcap)


@contextlib.contextmanager
def float64() -> Iterator[None]:
    """The model code casts to float32 in norms, RoPE and softmax; here that means float64."""
    kept = torch.float32, torch.float, torch.Tensor.float
    torch.set_default_dtype(torch.float64)
    torch.float32 = torch.float = torch.float64
    torch.Tensor.float = torch.Tensor.double
    try:
        yield
    finally:
        torch.float32, torch.float, torch.Tensor.float = kept
        torch.set_default_dtype(torch.float32)


def hf_config(case: dict) -> Gemma3TextConfig:
    def rope(kind: str) -> dict:
        linear = {"rope_type": "linear", "factor": case[f"{kind}_rope_scale"]}
        plain = {"rope_type": "default"}
        return {
            **(linear if case[f"{kind}_rope_scale"] != 1 else plain),
            "rope_theta": case[f"{kind}_rope_base"],
        }

    return Gemma3TextConfig(
        vocab_size=case["vocab_size"],
        hidden_size=case["embed_dim"],
        intermediate_size=case["mlp_dim"],
        num_hidden_layers=case["num_layers"],
        num_attention_heads=case["num_heads"],
        num_key_value_heads=case["num_kv_heads"],
        head_dim=case["head_dim"],
        layer_types=[LAYER_TYPES[letter] for letter in layer_letters(case)],
        sliding_window=case["sliding_window"],  # both count the token itself
        rope_parameters={"sliding_attention": rope("local"), "full_attention": rope("global")},
        query_pre_attn_scalar=round(case["query_scale"] ** -2),
        attn_logit_softcapping=case["attn_softcap"],
        final_logit_softcapping=case["final_softcap"],
        tie_word_embeddings=case["tied_embedding"],
        rms_norm_eps=case["norm_eps"],
        pad_token_id=None,  # else the padding's embedding gets no gradient
        attn_implementation="eager_with_softcap",
    )


def run(case: dict) -> dict[str, np.ndarray]:
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(hf_config(case)).to(torch.get_default_dtype()).eval()
    parameters = dict(model.named_parameters())
    expected = {name: tuple(value.shape) for name, value in parameters.items()}
    assert expected == shapes(case), set(expected.items()) ^ set(shapes(case).items())
    with torch.no_grad():
        for name, weight in make_weights(case).items():
            parameters[name].copy_(torch.from_numpy(weight))

    tokens, labels = (torch.from_numpy(ids).long() for ids in make_tokens(case))
    logits = model(input_ids=tokens, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    loss.backward()
    numbers = {"logits": logits.detach().numpy(), "loss": np.array(loss.item())}
    for name, value in parameters.items():
        numbers[f"grad/{name}"] = probe(name, value.grad.numpy(), case["seed"])
    return numbers


def main() -> None:
    AttentionInterface.register("eager_with_softcap", eager_with_softcap)
    masks = modeling_gemma3.create_causal_mask.__globals__["ALL_MASK_ATTENTION_FUNCTIONS"]
    masks.register("eager_with_softcap", masks["eager"])

    kept = {}
    for name, case in CASES.items():
        single = run(case)
        with float64():
            double = run(case)
        assert double["logits"].dtype == np.float64
        apart = max(float(np.abs(double[k] - single[k]).max()) for k in double)
        print(f"{name:16} loss {double['loss']:.6f}  float32 differs by {apart:.1e}")
        assert apart < 1e-3, "float64 and float32 must be the same function"
        double["logits"] = double["logits"].astype(np.float32)
        kept |= {f"{name}/{key}": value for key, value in double.items()}
    path = Path(__file__).with_name("gemma3_tiny.npz")
    np.savez_compressed(path, **kept)
    print(f"{path}: {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
