"""Quantisation-aware training: what it computes with is what a GGUF holds."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import config, make_run, params_of

from gemma_jax import runs
from gemma_jax.data.tokens import Corpus
from gemma_jax.errors import UserError
from gemma_jax.exchange import export_model, import_model
from gemma_jax.experiment import Experiment, build, run
from gemma_jax.model.transformer import Transformer
from gemma_jax.ops.fake_quant import fake_quantize
from gemma_jax.settings import override
from gemma_jax.trained import evaluate
from gemma_jax.training.loop import LoopConfig
from gemma_jax.training.optim import AdamW
from gemma_jax.tuning.lora import Lora
from gemma_jax.tuning.qat import Qat, quantized


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("qat")
    make_run(path / "base", config())
    for number in range(12):
        lines = "\n".join(f"{i} green leaves and {i * number} red ones" for i in range(80))
        (path / f"part{number:02}.txt").write_text(lines)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        yield path


@pytest.fixture(scope="module")
def experiment(folder):
    return Experiment(
        name="rounded",
        init="base",
        data=Corpus(path="data", sources=("part*.txt",), tokenizer="base/tokenizer.model"),
        quantization=Qat(),
        optimizer=AdamW(learning_rate=3e-3),
        tokens=20 * 512,
        batch_tokens=512,
        seq_len=64,
        train=LoopConfig(log_every=10, eval_every=20, checkpoint_every=20),
    )


@pytest.fixture(scope="module")
def result(experiment):
    return run(experiment)


def again(run_folder, path):
    """A run as Q4_0 in a GGUF, and that read again."""
    export_model(run_folder, path / "q4.gguf", format="gguf", dtype="q4_0")
    import_model(path / "q4.gguf", path / "again")
    # The same ids from another file than the token set's; a GGUF's model computes in bfloat16.
    for name in (runs.TOKENIZER, runs.MODEL):
        shutil.copy(f"base/{name}", path / "again" / name)
    return path / "again"


def test_a_file_holds_bit_for_bit_the_weights_that_were_trained(experiment, result, tmp_path):
    loaded = runs.load_model(experiment.folder)
    seen = quantized(Qat(), loaded.model.axes(), loaded.params)
    expected = {
        jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree.leaves_with_path(seen)
    }
    file = again(experiment.folder, tmp_path)
    found = params_of(file)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    # What was validated is that file's model, and not the full weights.
    measured = evaluate(file, data="data", seq_len=64)
    assert measured["bits_per_byte"] == pytest.approx(result["bits_per_byte"], rel=1e-5)
    full = evaluate(experiment.folder, data="data", seq_len=64)
    assert full["bits_per_byte"] != pytest.approx(result["bits_per_byte"], rel=1e-5)


def test_training_with_rounded_weights_beats_rounding_afterwards(experiment, result, tmp_path):
    plain = dataclasses.replace(experiment, name="plain", quantization=None)
    own = run(plain)["bits_per_byte"]
    assert own == pytest.approx(
        evaluate(plain.folder, data="data", seq_len=64)["bits_per_byte"], rel=1e-6
    )
    file = again(plain.folder, tmp_path)
    afterwards = evaluate(file, data="data", seq_len=64)["bits_per_byte"]
    assert result["bits_per_byte"] < afterwards


@pytest.mark.parametrize("scheme", ["q4_0", "int4", "sfp8"])
def test_matrices_are_rounded_along_their_inputs(scheme):
    model = Transformer(config(tied_embedding=False))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: jnp.asarray(rng.standard_normal(x.shape), jnp.float32), model.shapes()
    )
    found = quantized(Qat(scheme=scheme), model.axes(), params)
    block, own = found["periods"]["block_1"], params["periods"]["block_1"]
    layer = lambda x: x[0]  # noqa: E731
    for inputs, path in (
        ((0,), ("attention", "query")),
        ((0, 1), ("attention", "output")),
        ((0,), ("mlp", "up")),
        ((0,), ("mlp", "down")),
    ):
        here, there = (layer(tree[path[0]][path[1]]) for tree in (block, own))
        np.testing.assert_array_equal(here, fake_quantize(there, scheme, inputs))
    for table in ("embedder", "head"):
        here, there = found[table]["embedding"], params[table]["embedding"]
        np.testing.assert_array_equal(here, fake_quantize(there, scheme, (1,)))
        kept = quantized(Qat(scheme=scheme, embedding=False), model.axes(), params)
        np.testing.assert_array_equal(kept[table]["embedding"], there)
    norm = ("pre_attention_norm", "scale")
    np.testing.assert_array_equal(block[norm[0]][norm[1]], own[norm[0]][norm[1]])


def test_what_cannot_be_done_is_refused_before_training(experiment, folder):
    with pytest.raises(UserError, match="adapter and quantization do not go together"):
        dataclasses.replace(experiment, adapter=Lora())
    with pytest.raises(UserError, match="scheme"):
        Qat(scheme="q5_0")
    make_run(folder / "odd", config(mlp_dim=40))
    odd = dataclasses.replace(experiment, name="odd", init="odd", model=config(mlp_dim=40))
    with pytest.raises(UserError, match="mlp/down sums over 40 inputs, no multiple of 32"):
        run(odd)


def test_a_run_may_begin_with_rounded_weights(experiment, folder):
    """Those of the exported file, which rounding leaves as they are."""
    settings = {"name": "begun", "quantization.from_rounded": True}
    job = build(override(experiment, settings))
    shapes = jax.eval_shape(job.init_params)
    began = job.load_params(job.layout.shardings(job.axes, shapes))
    wanted = runs.load_model("base", quantization=Qat()).params
    whole = runs.load_model("base").params
    joined = job.join(began, None, None)
    began, wanted, joined, whole = jax.device_get((began, wanted, joined, whole))
    for x, y, z in zip(*map(jax.tree.leaves, (began, wanted, joined)), strict=True):
        np.testing.assert_array_equal(x, y)
        np.testing.assert_array_equal(x, z)
    assert any((x != y).any() for x, y in zip(*map(jax.tree.leaves, (whole, began)), strict=True))
    nothing = override(experiment, {**settings, "name": "x", "init": None})
    with pytest.raises(UserError, match=r"from_rounded .*init=RUN"):
        build(nothing)
