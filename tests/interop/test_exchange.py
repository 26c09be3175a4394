"""Import and export of whole models: what goes out comes back, bit for bit, or not at all."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from models import config, make_run, params_of

from gemma_jax import exchange, runs
from gemma_jax.data.tokenizer import Tokenizer
from gemma_jax.errors import UserError
from gemma_jax.exchange import export_model, import_model
from gemma_jax.interop import gguf, hf

CASES = {
    "plain": config(embed_dim=32, head_dim=8, num_layers=6),
    "remainder_untied": config(
        embed_dim=32, head_dim=8, num_layers=5, attn_pattern="GLL", tied_embedding=False
    ),
    "settings": config(
        embed_dim=32,
        head_dim=8,
        attn_pattern="G",
        global_rope_scale=8.0,
        global_rope_base=20_000.0,
        local_rope_base=500.0,
        final_softcap=30.0,
        norm_eps=1e-5,
        vocab_size=700,  # more rows than the tokenizer has pieces
    ),
}


@pytest.fixture(params=list(CASES))
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return make_run(tmp_path / "run", CASES[request.param])


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run", CASES["plain"])


def settings(run: Path) -> dict:
    values = json.loads((run / runs.MODEL).read_text())
    letters = runs.read_config(run / runs.MODEL).layer_letters
    kept = {k: v for k, v in values.items() if k not in ("compute_dtype", "attn_pattern")}
    if "L" not in letters:  # then no file need speak of windows
        kept = {k: v for k, v in kept.items() if k != "sliding_window"}
    return {**kept, "letters": letters}


def check_equal(a: Path, b: Path) -> None:
    ours, theirs = params_of(a), params_of(b)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert np.array_equal(value.view(np.int32), theirs[name].view(np.int32)), name
    assert settings(a) == settings(b)


def same_ids(a: Path, b: Path) -> None:
    first, second = (Tokenizer.load(run / runs.TOKENIZER) for run in (a, b))
    text = "def f(x):\n    return 'ünï' + \"  🙂\"\n<start_of_turn>user"
    for control in (False, True):
        ids = first.encode(text, control=control)
        assert second.encode(text, control=control) == ids
    assert first.control_ids == second.control_ids


@pytest.mark.parametrize("format", ["hf", "gguf"])
def test_float32_there_and_back(run: Path, tmp_path: Path, format: str) -> None:
    export_model(run, tmp_path / "out.gguf", format=format, dtype="f32")
    import_model(tmp_path / "out.gguf", tmp_path / "again")
    check_equal(run, tmp_path / "again")
    same_ids(run, tmp_path / "again")


@pytest.mark.parametrize("format", ["hf", "gguf"])
def test_bfloat16_there_and_back(tmp_path: Path, format: str) -> None:
    run = make_run(tmp_path / "run", CASES["remainder_untied"], bfloat16=True)
    export_model(run, tmp_path / "out.gguf", format=format, dtype="bf16")
    import_model(tmp_path / "out.gguf", tmp_path / "again")
    check_equal(run, tmp_path / "again")


@pytest.mark.parametrize(
    ("format", "dtype"),
    [("hf", "bf16"), ("hf", "f16"), *(("gguf", dtype) for dtype in gguf.DTYPES)],
)
def test_a_second_trip_changes_nothing(
    small: Path, tmp_path: Path, format: str, dtype: str
) -> None:
    """What rounds does so once: of an export of an import the weights are the same bytes."""
    written = []
    for name in ("run", "two"):
        export_model(tmp_path / name, tmp_path / "out" / name, format=format, dtype=dtype)
        (file,) = (tmp_path / "out" / name).glob("*.[sg]*[sf]")
        written.append(file.read_bytes().replace(b"run", b"two"))
        if name == "run":
            import_model(file if format == "gguf" else file.parent, tmp_path / "two")
    assert written[0] == written[1]


def test_an_existing_destination_is_refused(small: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="there exists already"):
        export_model(small, tmp_path / "there", format="hf")
    export_model(small, tmp_path / "out", format="hf")
    with pytest.raises(UserError, match="there exists already"):
        import_model(tmp_path / "out", tmp_path / "there")
    assert not any((tmp_path / "there").iterdir())


def test_what_is_unknown_is_refused(small: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="format='onnx' must be one of hf, gguf"):
        export_model(small, tmp_path / "a", format="onnx")
    with pytest.raises(UserError, match="dtype='q4_0' of hf must be one of"):
        export_model(small, tmp_path / "a", format="hf", dtype="q4_0")
    with pytest.raises(UserError, match="is not the folder of a run"):
        export_model(tmp_path, tmp_path / "a", format="hf")
    with pytest.raises(UserError, match="nowhere cannot be read"):
        import_model(tmp_path / "nowhere", tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_half_blocks_are_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", config(mlp_dim=40))
    with pytest.raises(UserError, match="mlp_dim=40 is no multiple of 32, the block of q8_0"):
        export_model(run, tmp_path / "a.gguf", format="gguf", dtype="q8_0")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"attn_softcap": 5.0}, "model.attn_softcap=5.0"),
        ({"qk_norm": False}, "model.qk_norm=False"),
        ({"query_scale": 10.5**-0.5}, "model.query_scale="),
    ],
)
@pytest.mark.parametrize("format", ["hf", "gguf"])
def test_what_cannot_be_said_is_refused(
    tmp_path: Path, changes: dict, match: str, format: str
) -> None:
    run = make_run(tmp_path / "run", config(**changes))
    with pytest.raises(UserError, match=match):
        export_model(run, tmp_path / "a", format=format, dtype="f32")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "full")])
@pytest.mark.parametrize("dest", ["out", "out.gguf"])
def test_an_interrupted_export_leaves_nothing(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dest: str, error: BaseException
) -> None:
    stop_at_last(monkeypatch, "to_foreign", error)
    with pytest.raises((KeyboardInterrupt, UserError, OSError)):
        export_model(small, tmp_path / dest, format="gguf" if "." in dest else "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_interrupted_import_leaves_nothing(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_model(small, tmp_path / "out", format="hf")
    stop_at_last(monkeypatch, "from_foreign", KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        import_model(tmp_path / "out", tmp_path / "again")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


def stop_at_last(monkeypatch: pytest.MonkeyPatch, name: str, error: BaseException) -> None:
    """The final norm, the last tensor of a tied model, is not converted."""
    convert: Callable = getattr(exchange.Weight, name)

    def stop(weight: exchange.Weight, value: np.ndarray) -> np.ndarray:
        if weight.path[0] == "final_norm":
            raise error
        return convert(weight, value)

    monkeypatch.setattr(exchange.Weight, name, stop)


def test_files_beside_the_weights(small: Path, tmp_path: Path) -> None:
    export_model(small, tmp_path / "hf", format="hf", dtype="bf16")
    names = {path.name for path in (tmp_path / "hf").iterdir()}
    assert names == {
        *(hf.CONFIG, hf.GENERATION, "README.md", "model.safetensors"),
        *("tokenizer.model", "tokenizer.json", "tokenizer_config.json"),
    }
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "pattern `LLG` with a window of 16 tokens" in card
    export_model(small, tmp_path / "gguf", format="gguf", dtype="q8_0")
    assert {path.name for path in (tmp_path / "gguf").iterdir()} == {"run-q8_0.gguf", "Modelfile"}
    assert (tmp_path / "gguf" / "Modelfile").read_text().startswith("FROM ./run-q8_0.gguf\n")


def test_a_tokenizer_of_another_model_is_refused(small: Path, tmp_path: Path) -> None:
    export_model(small, tmp_path / "out", format="hf")
    make_run(tmp_path / "other", config(vocab_size=600))
    export_model(tmp_path / "other", tmp_path / "small", format="hf")
    with pytest.raises(UserError, match="has 640 ids and its model 600"):
        import_model(tmp_path / "small", tmp_path / "again")
