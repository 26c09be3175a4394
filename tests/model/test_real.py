"""The real Gemma 3 270M against kept numbers of transformers (tests/goldens/real_270m.json)."""

import dataclasses
import json
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import real_files
from clients.prompts import PROMPTS

from gemma_jax import runs
from gemma_jax.data.tokenizer import BOS
from gemma_jax.exchange import import_model
from gemma_jax.model.transformer import Transformer

pytestmark = [pytest.mark.slow, *real_files.needs_real]
GOLDENS = json.loads((Path(__file__).parents[1] / "goldens" / "real_270m.json").read_text())


def test_logits_and_losses() -> None:
    with tempfile.TemporaryDirectory() as folder:
        import_model(real_files.MODEL, Path(folder) / "run")
        loaded = runs.load_model(Path(folder) / "run")
    config = dataclasses.replace(loaded.model.config, compute_dtype="float32")
    model = Transformer(config)
    forward = jax.jit(lambda p, t: model.logits(p, model.hidden(p, t))[0])
    assert GOLDENS.keys() == PROMPTS.keys()
    for name, text in PROMPTS.items():
        ids, golden = [BOS, *loaded.tokenizer.encode(text)], GOLDENS[name]
        assert len(ids) == golden["tokens"]
        tokens = jnp.array([ids + [0] * (-len(ids) % 64)], jnp.int32)
        logits = forward(loaded.params, tokens)[: len(ids)]
        rows = np.asarray(logits[np.array(golden["positions"])])
        there = np.take_along_axis(rows, np.array(golden["top_ids"]), axis=-1)
        assert np.abs(there - golden["top_logits"]).max() <= 5e-4, name
        assert np.array_equal(rows.argmax(-1), np.array(golden["top_ids"])[:, 0]), name
        losses = jax.nn.logsumexp(logits[:-1], axis=-1) - logits[np.arange(len(ids) - 1), ids[1:]]
        assert abs(float(losses.mean()) - golden["loss"]) <= 1e-4, name
