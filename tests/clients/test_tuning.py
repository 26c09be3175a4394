"""Adapters in both directions with peft, chat masks with transformers, NF4 with bitsandbytes."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from clients import clients
from goldens.tokenizer_cases import CHATS
from models import TOKENIZER, VOCAB, config, logits_of, make_adapter, make_run

from gemma_jax.data.chat import mark_chat
from gemma_jax.data.tokenizer import BOS, Tokenizer
from gemma_jax.exchange import export_model, import_model
from gemma_jax.tuning.lora import ATTENTION, MLP, Lora
from gemma_jax.tuning.nf4 import LEVELS, SCALE_LEVELS, Packed, dequantise, quantise

pytestmark = pytest.mark.clients

TOKENS = [
    [BOS, *np.random.default_rng(seed).integers(107, VOCAB, 40).tolist()] for seed in range(2)
]
UNTIED = config(num_layers=4, tied_embedding=False)
ADAPTERS = {
    "all": (config(num_layers=5), Lora(targets=(*ATTENTION, *MLP), rank=4, alpha=6.0)),
    "rslora": (config(), Lora(targets=("query", "output"), rank=9, alpha=6.0, rslora=True)),
    "table": (config(), Lora(targets=("embedding", "down"), rank=3, alpha=4.0)),
    "untied": (UNTIED, Lora(targets=("embedding", "head", "value"), rank=4)),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_peft_takes_our_adapters(tmp_path: Path, name: str) -> None:
    settings, adapter = ADAPTERS[name]
    base = make_run(tmp_path / "base", settings)
    run = make_adapter(tmp_path / "run", base, adapter)
    export_model(base, tmp_path / "hf", format="hf", dtype="f32")
    export_model(run, tmp_path / "peft", format="peft")
    # A tied table is merged twice by peft, once under each of its names.
    job = {"model": str(tmp_path / "hf"), "adapter": str(tmp_path / "peft"), "tokens": TOKENS}
    job |= {"out": str(tmp_path / "out"), "merge": name != "table"}
    clients.run("transformers", [job], tmp_path, "tuning")
    ours, plain = logits_of(run, TOKENS), logits_of(base, TOKENS)
    assert np.abs(ours[0] - plain[0]).max() > 0.5
    for folder in ("out", "out/merged")[: 1 + job["merge"]]:
        for mine, theirs in zip(ours, clients.logits(tmp_path / folder, 2), strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-4)


MADE = {
    "linear": {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]},
    "patterns": {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": ["k_proj", "up_proj"],
        "rank_pattern": {"layers.0.self_attn.k_proj": 2},
        "alpha_pattern": {"layers.1.mlp.up_proj": 5, "up_proj": 3, "0.mlp.up_proj": 9},
        "use_rslora": True,
    },
    "table": {
        "r": 2,
        "lora_alpha": 3,
        "target_modules": ["embed_tokens"],
        "ensure_weight_tying": True,
    },
    "some_layers": {
        "r": 3,
        "lora_alpha": 2,
        "target_modules": ["v_proj", "gate_proj"],
        "layers_to_transform": [1, 4],
    },
}


@pytest.mark.parametrize("name", MADE)
def test_we_take_adapters_of_peft(tmp_path: Path, name: str) -> None:
    base = make_run(tmp_path / "base", config(num_layers=7))
    export_model(base, tmp_path / "hf", format="hf", dtype="f32")
    job = {"model": str(tmp_path / "hf"), "make": MADE[name], "tokens": TOKENS}
    clients.run("transformers", [{**job, "out": str(tmp_path / "out")}], tmp_path, "tuning")
    import_model(tmp_path / "out" / "adapter", tmp_path / "run", base=base)
    ours, plain = logits_of(tmp_path / "run", TOKENS), logits_of(base, TOKENS)
    assert np.abs(ours[0] - plain[0]).max() > 0.1
    for mine, theirs in zip(ours, clients.logits(tmp_path / "out", 2), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-4)


ODD = [
    [("user", "a\n\n"), ("assistant", "\n\n  b  \n")],
    [
        ("user", "x"),
        ("assistant", "🙂🙂"),
        ("user", "\u00a0y\u2003"),
        ("assistant", "é\u0301 \n\n z"),
    ],
    [("system", "S\n"), ("user", "\n\nq"), ("assistant", "line\n\nline\n\n\n\nend")],
    [("user", "ends with the user"), ("assistant", "1"), ("user", "open")],
    [("user", "model\n"), ("assistant", "model\nuser\n"), ("user", "1 2  3"), ("model", "\t\tx")],
]


def test_masks_are_those_of_transformers(tmp_path: Path) -> None:
    base = make_run(tmp_path / "base", config())
    export_model(base, tmp_path / "hf", format="hf", dtype="f32")
    odd = [[{"role": role, "content": text} for role, text in turns] for turns in ODD]
    parts = [{"type": "text", "text": "\n a"}, {"type": "text", "text": "b \n"}]
    parts[1:1] = [{"type": "text", "text": text} for text in (" c", "", "d\n\n")]
    in_parts = [{"role": role, "content": parts} for role in ("system", "user", "assistant")]
    more = [
        {"role": "user", "content": "a", "name": "x", "tool_calls": None},
        {"role": "model", "content": "b", "weight": 1},
    ]
    chats = [*CHATS, *odd, in_parts, more]
    job = {"tokenizer": str(tmp_path / "hf"), "conversations": chats, "out": str(tmp_path / "out")}
    clients.run("transformers", [job], tmp_path, "tuning")
    tokenizer = Tokenizer.load(TOKENIZER)
    theirs = json.loads((tmp_path / "out" / "chats.json").read_text())
    for messages, row in zip(chats, theirs, strict=True):
        marked = mark_chat(tokenizer, messages)
        assert [token for token, _ in marked] == row["ids"], messages
        assert [int(spoken) for _, spoken in marked] == row["mask"], messages


@pytest.mark.parametrize("shape", [(96, 128), (640, 256), (33, 2)])
def test_nf4_is_that_of_bitsandbytes(tmp_path: Path, shape: tuple[int, int]) -> None:
    # Rows of whole blocks: its CPU kernel reads others wrongly.
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32) * 0.03
    values[:, 0] *= 5
    np.save(tmp_path / "values.npy", values)
    job = {"values": str(tmp_path / "values.npy"), "out": str(tmp_path / "out")}
    clients.run("transformers", [job], tmp_path, "tuning")
    theirs, ours = np.load(tmp_path / "out" / "nf4.npz"), quantise(values)
    np.testing.assert_array_equal(LEVELS, theirs["levels"])
    np.testing.assert_array_equal(SCALE_LEVELS, theirs["scale_levels"])
    np.testing.assert_array_equal(ours.codes[: len(theirs["codes"])], theirs["codes"])
    # Its CPU kernel for scales finds, here and there, a neighbour of the nearest level.
    padded = np.pad(values.ravel(), (0, -values.size % 64)).reshape(-1, 64)
    wanted = np.abs(padded).max(axis=1) - theirs["offset"]
    wanted /= np.repeat(theirs["scale_scales"], 256)[: len(wanted)]
    far = np.abs(wanted - SCALE_LEVELS[ours.scales]) - np.abs(
        wanted - SCALE_LEVELS[theirs["scales"]]
    )
    assert far.max() <= 1e-7
    assert (np.abs(ours.scales.astype(int) - theirs["scales"]) <= 1).all()
    assert (ours.scales != theirs["scales"]).mean() < 0.05
    # What the two read out of the same parts is the same, also within one compiled program.
    codes = np.zeros_like(ours.codes)
    codes[: len(theirs["codes"])] = theirs["codes"]
    packed = Packed(codes, theirs["scales"], theirs["scale_scales"], theirs["offset"])
    for read in (dequantise, jax.jit(dequantise)):
        back = np.asarray(read(packed))[: values.size].reshape(shape)
        np.testing.assert_array_equal(back, theirs["values"])
