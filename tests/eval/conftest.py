"""A small random model with a tokenizer, for tests of what is scored."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from gemma_jax.data.tokenizer import Tokenizer
from gemma_jax.model.config import tiny
from gemma_jax.model.transformer import Transformer
from gemma_jax.runs import describe_model
from gemma_jax.training.weights import WeightsWriter

TOKENIZER = Path(__file__).parent.parent / "goldens" / "tokenizer_tiny.model"


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """The model as a folder that verbs take, such as an import leaves behind."""
    folder = tmp_path_factory.mktemp("eval") / "random"
    tokenizer = Tokenizer.load(TOKENIZER)
    config = dataclasses.replace(
        tiny(),
        vocab_size=tokenizer.vocab_size,
        num_layers=2,
        attn_pattern="LG",
        max_seq_len=128,
    )
    shapes, rng = Transformer(config).shapes(), np.random.default_rng(0)
    writer = WeightsWriter(folder, shapes)

    def write(tree, path=()):
        for name, value in tree.items():
            if isinstance(value, dict):
                write(value, (*path, name))
            else:
                drawn = rng.normal(0, 0.3, value.shape).astype(np.float32)
                writer.write((*path, name), 0, value.shape[0], drawn)

    write(shapes)
    describe_model(folder, config, tokenizer)
    return folder
