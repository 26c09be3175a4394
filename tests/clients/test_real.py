"""The real Gemma 3 270M: ours, transformers, llama.cpp and mlx-lm on the same texts."""

import dataclasses
import functools
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import real_files
from clients import clients
from clients.prompts import PROMPTS

from gemma_jax import runs
from gemma_jax.data.tokenizer import BOS
from gemma_jax.exchange import export_model, import_model
from gemma_jax.model.attention import Place
from gemma_jax.model.transformer import Block, Transformer, unrolled

pytestmark = [pytest.mark.clients, *real_files.needs_real]
_ROOM = 64  # texts are padded to multiples, for fewer compilations
# mlx takes a third of a second a token here.
MLX_PROMPTS = ("capital", "question", "list", "russian", "korean", "greek")


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as path:  # several GB, which pytest would keep
        import_model(real_files.MODEL, Path(path) / "run")
        export_model(Path(path) / "run", Path(path) / "hf", format="hf", dtype="f32")
        yield Path(path)


@pytest.fixture(scope="module")
def loaded(folder: Path) -> runs.LoadedModel:
    loaded = runs.load_model(folder / "run")
    config = dataclasses.replace(loaded.model.config, compute_dtype="float32")
    return dataclasses.replace(loaded, model=Transformer(config))


@pytest.fixture(scope="module")
def tokens(loaded: runs.LoadedModel) -> list[list[int]]:
    ids = [[BOS, *loaded.tokenizer.encode(text)] for text in PROMPTS.values()]
    assert len(ids) >= 25
    assert len(ids[-1]) > loaded.model.config.sliding_window + 200
    return ids


@pytest.fixture(scope="module")
def theirs(folder: Path, tokens: list[list[int]]) -> Path:
    """What transformers gives."""
    out = folder / "transformers"
    job = {"model": str(folder / "hf"), "tokens": tokens, "out": str(out), "hidden": True}
    clients.run("transformers", [job], folder)
    return out


def padded(ids: list[int]) -> jax.Array:
    return jnp.array([ids + [0] * (-len(ids) % _ROOM)], jnp.int32)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def compare(
    ours: list[np.ndarray], theirs: list[np.ndarray], tokens: list[list[int]]
) -> dict[str, float]:
    """Ours against theirs over all positions of all texts."""
    most, same, count, kl = 0.0, 0, 0, 0.0
    losses = np.zeros(2)
    for ids, a, b in zip(tokens, ours, theirs, strict=True):
        most = max(most, float(np.abs(a - b).max()))
        same += int((a.argmax(-1) == b.argmax(-1)).sum())
        count += len(ids)
        p, q = log_softmax(b), log_softmax(a)
        kl += float((np.exp(p) * (p - q)).sum(dtype=np.float64))
        where = np.arange(len(ids) - 1), np.array(ids[1:])
        losses -= [q[where].sum(dtype=np.float64), p[where].sum(dtype=np.float64)]
    losses /= count - len(tokens)
    figures = {"difference": most, "top1": same / count, "kl": kl / count}
    figures |= {"loss": float(losses[0]), "their_loss": float(losses[1]), "tokens": count}
    print(clients.VERSIONS, figures)
    return figures


def test_logits(loaded: runs.LoadedModel, tokens: list[list[int]], theirs: Path) -> None:
    model = loaded.model
    forward = jax.jit(lambda p, t: model.logits(p, model.hidden(p, t))[0])
    ours = [np.asarray(forward(loaded.params, padded(ids)))[: len(ids)] for ids in tokens]
    figures = compare(ours, clients.logits(theirs, len(tokens)), tokens)
    assert figures["difference"] <= 5e-4
    assert figures["top1"] == 1


def test_hidden_states(loaded: runs.LoadedModel, tokens: list[list[int]], theirs: Path) -> None:
    """What each layer returns, within 1e-3 of its norm."""
    model, params = unrolled(loaded.model, loaded.params)
    config = model.config

    @functools.partial(jax.jit, static_argnums=0)
    def block(letter: str, layer: dict, x: jax.Array) -> jax.Array:
        positions = jnp.arange(x.shape[1], dtype=jnp.int32)[None]
        return Block(config, letter).apply({"params": layer}, x, Place(positions, None), None)[0]

    worst = np.zeros(config.num_layers + 1)
    for text, ids in enumerate(tokens):
        expected = np.load(theirs / f"hidden_{text}.npy")
        assert len(expected) == config.num_layers + 1
        x = params["embedder"]["embedding"][padded(ids)] * jnp.float32(config.embed_dim**0.5)
        for i, state in enumerate(expected):
            ours = np.asarray(x)[0, : len(ids)]
            error = np.linalg.norm(ours - state) / np.linalg.norm(state)
            worst[i] = max(worst[i], error)
            if i < config.num_layers:
                layer = jax.tree.map(lambda leaf: leaf[0], params["periods"][f"block_{i}"])
                x = block(config.attn_pattern[i], layer, x)
    print("hidden states", [f"{value:.1e}" for value in worst])
    assert worst.max() <= 1e-3


def test_llama_cpp(folder: Path, tokens: list[list[int]], theirs: Path) -> None:
    path, out = folder / "a.gguf", folder / "llama_cpp"
    export_model(folder / "run", path, format="gguf", dtype="f32")
    clients.run("llama_cpp", [{"model": str(path), "tokens": tokens, "out": str(out)}], folder)
    expected = clients.logits(theirs, len(tokens))
    figures = compare(clients.logits(out, len(tokens)), expected, tokens)
    assert figures["kl"] <= 1e-5
    assert figures["top1"] >= 0.998
    assert abs(figures["loss"] - figures["their_loss"]) <= 1e-3
    assert figures["difference"] <= 0.15


def test_mlx(folder: Path, tokens: list[list[int]], theirs: Path) -> None:
    """It rounds sqrt(640) to bfloat16."""
    chosen = [list(PROMPTS).index(name) for name in MLX_PROMPTS]
    ids, out = [tokens[i] for i in chosen], folder / "mlx"
    clients.run("mlx", [{"model": str(folder / "hf"), "tokens": ids, "out": str(out)}], folder)
    expected = clients.logits(theirs, len(tokens))
    figures = compare(clients.logits(out, len(ids)), [expected[i] for i in chosen], ids)
    assert figures["top1"] >= 0.99
