"""Random models of any settings as run folders, without training."""

import functools
from pathlib import Path

import jax
import numpy as np

from gemma_jax import adapted, runs
from gemma_jax.data.tokenizer import Tokenizer
from gemma_jax.model.config import ModelConfig
from gemma_jax.model.transformer import Transformer
from gemma_jax.training.weights import WeightsWriter, weights_hash
from gemma_jax.tuning.lora import Lora, init_adapter

TOKENIZER = Path(__file__).parent / "goldens" / "tokenizer_tiny.model"
VOCAB = 640
_BASE = {"vocab_size": VOCAB, "embed_dim": 64, "mlp_dim": 96, "num_layers": 3, "num_heads": 4}
_BASE |= {"num_kv_heads": 2, "head_dim": 64, "max_seq_len": 256, "attn_pattern": "LLG"}


def config(**changes: object) -> ModelConfig:
    values: dict = {**_BASE, "sliding_window": 16, "compute_dtype": "float32", **changes}
    return ModelConfig(**values)


def make_run(folder: Path, config: ModelConfig, *, seed: int = 0, bfloat16: bool = False) -> Path:
    """A run folder of random weights. Norms are far from 0, so that a forgotten 1 + w shows."""
    shapes = Transformer(config).shapes()
    writer = WeightsWriter(folder, shapes)
    rng = np.random.default_rng(seed)
    for path, leaf in jax.tree.leaves_with_path(shapes):
        names = tuple(key.key for key in path)
        scale = {"scale": 0.3, "embedding": config.embed_dim**-0.5}.get(names[-1], 0.12)
        value = (rng.standard_normal(leaf.shape) * scale).astype(np.float32)
        if bfloat16:
            value = np.asarray(jax.numpy.asarray(value, "bfloat16"), np.float32)
        writer.write(names, 0, leaf.shape[0], value)
    runs.describe_model(folder, config, Tokenizer.load(TOKENIZER))
    return folder


def params_of(run: Path) -> dict[str, np.ndarray]:
    """Every parameter by its path."""
    leaves = jax.tree.leaves_with_path(runs.load_model(run).params)
    return {jax.tree_util.keystr(path): np.asarray(value) for path, value in leaves}


def logits_of(run: Path, tokens: list[list[int]]) -> list[np.ndarray]:
    """float32 [T, V] of each text."""
    loaded = runs.load_model(run)
    forward = _forward(loaded.model)
    return [np.asarray(forward(loaded.params, np.array([ids], np.int32))) for ids in tokens]


@functools.cache
def _forward(model: Transformer):
    return jax.jit(lambda p, t: model.logits(p, model.hidden(p, t))[0])


def make_adapter(folder: Path, base: Path, settings: Lora, *, seed: int = 1) -> Path:
    """A run folder that holds a random adapter on `base`, far from zero."""
    model = Transformer(runs.read_config(base / runs.MODEL))
    like = jax.eval_shape(
        lambda: init_adapter(settings, model.axes(), model.shapes(), jax.random.key(0))
    )
    writer, rng = WeightsWriter(folder, like), np.random.default_rng(seed)
    for path, leaf in jax.tree.leaves_with_path(like):
        value = rng.standard_normal(leaf.shape).astype(np.float32) * 0.05
        writer.write(tuple(key.key for key in path), 0, leaf.shape[0], value)
    runs.describe_model(folder, model.config, Tokenizer.load(TOKENIZER))
    known = weights_hash(model.shapes(), runs.open_base(base).read)
    adapted.write_adapter(folder, adapted.Adapter(settings, str(base), known))
    return folder
