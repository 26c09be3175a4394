"""Hugging Face folders that lie, lack or surprise, and every spelling that is read."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from models import config, make_run, params_of
from safetensors.numpy import load_file, save_file

from gemma_jax.errors import UserError
from gemma_jax.exchange import export_model, import_model
from gemma_jax.interop import hf, hf_tensors
from gemma_jax.interop.hf import read_config

CONFIG = config(embed_dim=32, mlp_dim=32, head_dim=8, num_layers=4, global_rope_scale=8.0)
NORM = "model.layers.2.input_layernorm.weight"
FILE = "model.safetensors"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run", CONFIG)


@pytest.fixture
def folder(run: Path, tmp_path: Path) -> Path:
    export_model(run, tmp_path / "hf", format="hf", dtype="f32")
    return tmp_path / "hf"


def refused(folder: Path, match: str) -> None:
    with pytest.raises(UserError, match=match):
        import_model(folder, folder.parent / "again")
    assert not list(folder.parent.glob("again*"))


def change_config(folder: Path, **changes: object) -> None:
    """None takes a key away."""
    path = folder / hf.CONFIG
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


def change_tensors(folder: Path, **changes: np.ndarray | None) -> dict[str, np.ndarray]:
    tensors = load_file(folder / FILE) | changes
    tensors = {k: v for k, v in tensors.items() if v is not None}
    save_file(tensors, folder / FILE)
    return tensors


def check_weights(run: Path, folder: Path) -> None:
    import_model(folder, folder.parent / "again")
    ours, again = params_of(run), params_of(folder.parent / "again")
    assert ours.keys() == again.keys()
    assert all(np.array_equal(value, again[name]) for name, value in ours.items())


def test_missing_surplus_and_misshaped_tensors(folder: Path) -> None:
    norm = load_file(folder / FILE)[NORM]
    change_tensors(folder, **{NORM: None})
    refused(folder, f"has no tensor {NORM}, which its settings promise")
    change_tensors(folder, **{NORM: norm[:-1]})
    refused(folder, rf"tensor {NORM} of .* has shape \(31,\), and its settings make it \(32,\)")
    change_tensors(folder, **{NORM: norm, "model.odd": norm})
    refused(folder, "has a tensor model.odd that Gemma 3")


def test_bad_numbers(folder: Path) -> None:
    norm = load_file(folder / FILE)[NORM]
    for bad in (np.nan, -np.inf):
        change_tensors(folder, **{NORM: np.full_like(norm, bad)})
        refused(folder, f"tensor {NORM} of .* holds NaN or infinity")
    change_tensors(folder, **{NORM: norm.astype(np.int32)})
    refused(folder, f"tensor {NORM} of .* is of the type I32")


@pytest.mark.parametrize("part", [0, 4, 100, 0.1, 0.5, 0.9, -1])
def test_truncated_files(folder: Path, part: float) -> None:
    content = (folder / FILE).read_bytes()
    end = int(part * len(content)) if isinstance(part, float) else part
    (folder / FILE).write_bytes(content[:end])
    refused(folder, f"{FILE} is no whole safetensors file")


@pytest.mark.parametrize(
    ("length", "entry"),
    [
        (2**60, {}),
        (None, {"dtype": "F32", "shape": [2**60], "data_offsets": [0, 2**62]}),
        (None, {"dtype": "F32", "shape": [4], "data_offsets": [2**60, 2**60 + 16]}),
        (None, {"dtype": "X9", "shape": [4], "data_offsets": [0, 16]}),
    ],
)
def test_hostile_headers(folder: Path, length: int | None, entry: dict) -> None:
    text = json.dumps({NORM: entry}).encode()
    head = struct.pack("<Q", len(text) if length is None else length)
    (folder / FILE).write_bytes(head + text + bytes(64))
    refused(folder, f"{FILE} is no whole safetensors file")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "the architecture LlamaForCausalLM"),
        ({"architectures": None}, "the architecture None"),
        ({"architectures": {"a": 1}}, "describes the architecture"),
        ({"num_hidden_layers": 10**12}, "1000000000000 layers"),
        ({"num_hidden_layers": 3}, "has 4 layer_types"),
        ({"layer_types": ["chunked_attention"] * 4}, "of the kinds .'chunked_attention'"),
        ({"hidden_size": "wide"}, "does not describe a Gemma 3 model"),
        ({"hidden_size": float("inf")}, "does not describe a Gemma 3 model"),
        ({"hidden_size": 10**15}, "model.embed_tokens.weight of .* has shape"),
        ({"num_attention_heads": 0}, "num_heads=0 must be positive"),
        ({"rms_norm_eps": float("nan")}, "norm_eps=nan"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"hidden_activation": "relu"}, "hidden_activation='relu'"),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "the type 'yarn'"),
        ({"rope_parameters": 5}, "does not describe a Gemma 3 model"),
        ({"query_pre_attn_scalar": 0}, "does not describe|query_scale"),
        ({"tie_word_embeddings": False}, "has no tensor lm_head.weight"),
    ],
)
def test_bad_settings(folder: Path, changes: dict, match: str) -> None:
    change_config(folder, **changes)
    refused(folder, match)


def test_files_that_are_no_settings(folder: Path) -> None:
    for text, match in (("[]", "is not the settings"), ("{", "not valid JSON")):
        (folder / hf.CONFIG).write_text(text)
        refused(folder, match)
    (folder / hf.CONFIG).unlink()
    refused(folder, "does not exist")


def test_the_older_spelling(run: Path, folder: Path) -> None:
    new, _ = read_config(folder)
    change_config(folder, rope_parameters=None)
    assert read_config(folder)[0] == new
    change_config(folder, layer_types=None)
    assert read_config(folder)[0].layer_letters == "LLGL"
    change_config(folder, rope_scaling={"type": "linear", "factor": 8.0})
    assert read_config(folder)[0] == new
    check_weights(run, folder)


def test_what_a_config_leaves_out(folder: Path) -> None:
    """transformers' own defaults."""
    values = {"architectures": ["Gemma3ForCausalLM"]}
    (folder / hf.CONFIG).write_text(json.dumps(values))
    read, _ = read_config(folder)
    assert (read.num_layers, read.embed_dim, read.layer_letters[:6]) == (26, 2304, "LLLLLG")
    assert read.rope("G") == (1e6, 1.0)
    assert read.rope("L") == (1e4, 1.0)


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
def test_the_text_half_of_a_multimodal_model(run: Path, folder: Path, prefix: str) -> None:
    text = json.loads((folder / hf.CONFIG).read_text())
    values = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": text}
    (folder / hf.CONFIG).write_text(json.dumps(values))
    tensors = load_file(folder / FILE)
    tensors = {prefix + name.removeprefix("model."): value for name, value in tensors.items()}
    tensors["vision_tower.patch.weight"] = np.zeros((2, 2), np.float32)
    save_file(tensors, folder / FILE)
    check_weights(run, folder)


def test_a_head_repeated_in_a_tied_model(run: Path, folder: Path) -> None:
    tensors = load_file(folder / FILE)
    change_tensors(folder, **{"lm_head.weight": tensors["model.embed_tokens.weight"].copy()})
    check_weights(run, folder)


def split(folder: Path) -> dict:
    """Cuts the file in two, with an index."""
    tensors = load_file(folder / FILE)
    (folder / FILE).unlink()
    places = {}
    for i in range(2):
        name = f"model-{i + 1:05d}-of-00002.safetensors"
        part = {k: tensors[k] for k in sorted(tensors)[i::2]}
        save_file(part, folder / name)
        places |= dict.fromkeys(part, name)
    index = {"metadata": {}, "weight_map": places}
    (folder / hf_tensors.INDEX).write_text(json.dumps(index))
    return index


def test_several_files(run: Path, folder: Path) -> None:
    split(folder)
    check_weights(run, folder)


def test_bad_indices(folder: Path) -> None:
    index = split(folder)
    first = sorted(folder.glob("*.safetensors"))[0]

    def refused_index(index: object, match: str) -> None:
        (folder / hf_tensors.INDEX).write_text(json.dumps(index))
        refused(folder, match)

    refused_index({}, "is no index of files")
    refused_index([], "is not the index of a model.s files")
    refused_index({"weight_map": {"a": "../a.safetensors"}}, "outside of the folder")
    refused_index({"weight_map": {"a": "gone.safetensors"}}, "gone.safetensors is missing")
    refused_index({"weight_map": {NORM: first.name}}, "has no tensor model")
    twice = index["weight_map"] | {"x": "model-00003.safetensors"}
    (folder / "model-00003.safetensors").write_bytes(first.read_bytes())
    refused_index({"weight_map": twice}, "lies both in")


def test_large_models_are_written_in_several_files(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf_tensors, "_FILE_BYTES", 60_000)
    export_model(run, tmp_path / "hf", format="hf", dtype="f32")
    assert len(list((tmp_path / "hf").glob("model-*-of-*.safetensors"))) > 2
    check_weights(run, tmp_path / "hf")
