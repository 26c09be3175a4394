"""Adapters in PEFT's format: what is damaged, foreign or of another function is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from models import config, make_adapter, make_run, params_of
from safetensors.numpy import load_file, save_file

from gemma_jax.errors import UserError
from gemma_jax.exchange import export_model, import_model
from gemma_jax.interop.peft import CONFIG, TENSORS
from gemma_jax.tuning.lora import Lora

SMALL = {"num_layers": 2, "attn_pattern": "LG", "embed_dim": 32, "mlp_dim": 48, "head_dim": 16}
A = "base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"
B = A.replace("lora_A", "lora_B")
TABLE = "base_model.model.model.embed_tokens"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base, and the files of an adapter on its table and one of its matrices."""
    path = tmp_path_factory.mktemp("peft")
    make_run(path / "base", config(**SMALL))
    settings = Lora(targets=("down", "embedding"), rank=1, alpha=7.0, rslora=True)
    make_adapter(path / "run", path / "base", settings)
    export_model(path / "run", path / "peft", format="peft")
    return path


@pytest.fixture
def files(folder, tmp_path):
    shutil.copytree(folder / "peft", tmp_path / "peft")
    return tmp_path / "peft"


def change(files: Path, **settings: object) -> None:
    values = json.loads((files / CONFIG).read_text()) | settings
    (files / CONFIG).write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init_lora_weights": "pissa"}, "has init_lora_weights='pissa'; only True"),
        ({"init_lora_weights": "olora"}, "has init_lora_weights='olora'; only True"),
        ({"use_qalora": True}, "has use_qalora=True; only False"),
        ({"r": 9}, "the rank 9, and its factors have 1; fetch both"),
        ({"r": 0}, "has r=0, which must be above 0"),
        ({"rank_pattern": {"down_proj": 3}}, "down_proj the rank 3, and its factors have 1"),
        ({"lora_alpha": None}, "has lora_alpha=None, which must be above 0"),
        ({"lora_alpha": "x"}, "has lora_alpha='x', which must be"),
        ({"alpha_pattern": [1]}, r"has alpha_pattern=\[1\], which must be"),
        ({"alpha_pattern": {"(": 3}}, "has alpha_pattern={.*}, which must be"),
        ({"alpha_pattern": {"up_proj": "x"}}, "has alpha_pattern={.*}, which must be"),
    ],
)
def test_settings_of_another_function_are_refused(folder, files, settings, message) -> None:
    change(files, **settings)
    with pytest.raises(UserError, match=message):
        import_model(files, files.parent / "run", base=folder / "base")


def without(tensors, name):
    return {key: value for key, value in tensors.items() if key != name}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: without(t, B), "has no matrices .*lora_A.weight and .*lora_B.weight"),
        (lambda t: t | {A: t[A][None]}, "has no matrices .*lora_A.weight and"),
        (lambda t: t | {A: t[A].ravel()}, "has no matrices .*lora_A.weight and"),
        (lambda t: t | {A: t[A] * np.nan}, "the factors of .*down_proj .* are not finite"),
        (lambda t: t | {A: t[A][:, :-1].copy()}, "have shapes .*, which do not fit the base"),
        (lambda t: t | {"x": t[A]}, "has a tensor x that the base has no matrix for"),
        (lambda t: {}, "holds no factors of an adapter"),
        (
            lambda t: {key: value for key, value in t.items() if "lm_head" not in key},
            "adapts embed_tokens and lm_head apart",
        ),
        (
            lambda t: {key: value for key, value in t.items() if "embed" not in key},
            "adapts embed_tokens and lm_head apart",
        ),
        (
            lambda t: t | {f"{TABLE}.base_layer.weight": np.ones((640, 32), np.float32)},
            "trained on another table of model.embed_tokens",
        ),
    ],
)
def test_damaged_factors_are_refused(folder, files, damage, message) -> None:
    tensors = damage(load_file(files / TENSORS))
    save_file({key: np.ascontiguousarray(x) for key, x in tensors.items()}, files / TENSORS)
    with pytest.raises(UserError, match=message):
        import_model(files, files.parent / "run", base=folder / "base")


def test_a_file_that_was_cut_is_refused(folder, files) -> None:
    whole = (files / TENSORS).read_bytes()
    for content in (b"", whole[:20], whole[:-1]):
        (files / TENSORS).write_bytes(content)
        with pytest.raises(UserError, match="is no whole safetensors file"):
            import_model(files, files.parent / "run", base=folder / "base")


def test_copies_of_the_base_and_other_precisions_change_nothing(folder, files) -> None:
    """peft keeps a table beside its adapter, here in float16."""
    tensors = load_file(files / TENSORS)
    table = params_of(folder / "base")["['embedder']['embedding']"].astype(np.float16)
    names = (f"{TABLE}.base_layer.weight", "base_model.model.lm_head.base_layer.weight")
    save_file(tensors | dict.fromkeys(names, table), files / TENSORS)
    import_model(files, files.parent / "run", base=folder / "base")
    wanted, found = params_of(folder / "run"), params_of(files.parent / "run")
    for name, value in wanted.items():
        np.testing.assert_array_equal(value, found[name])
