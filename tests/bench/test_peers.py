"""Peers are scripts in processes of their own: how they are called, and what they may print."""

import ast
import importlib.util
import json
import stat
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from gemma_jax.bench import peers, run
from gemma_jax.bench.config import BenchConfig
from gemma_jax.bench.inputs import zipf_tokens
from gemma_jax.bench.timing import ROW_KEYS
from gemma_jax.errors import UserError
from gemma_jax.model.config import gemma3_270m, tiny
from gemma_jax.settings import to_json

CONFIG = BenchConfig(what="train", model=tiny(), batch=8, seq_len=32, steps=2, repeats=1)
DECODE = BenchConfig(what="decode", model=tiny(), batch=2, seq_len=16, steps=4, repeats=1)


@pytest.fixture(scope="module")
def common() -> ModuleType:
    spec = importlib.util.spec_from_file_location("common", peers.FOLDER / "common.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_command_lines() -> None:
    line = peers.command("hf-compile", CONFIG, "/usr/bin/python3")
    assert line[:3] == ["/usr/bin/python3", str(peers.FOLDER / "hf_train.py"), "--compile"]
    given = dict(zip(line[3::2], line[4::2], strict=True))
    assert json.loads(given.pop("--model")) == to_json(tiny())
    sizes = {"batch": 8, "seq-len": 32, "steps": 2, "repeats": 1, "warmup": 2, "microbatches": 1}
    assert given == {f"--{key}": str(x) for key, x in sizes.items()} | {"--dtype": "float32"}
    line = peers.command("hf-compile", DECODE, None)
    assert line[:3] == [sys.executable, str(peers.FOLDER / "hf_generate.py"), "--static"]
    assert "--warmup" not in line


def test_scripts_know_the_options_they_are_given(common: ModuleType) -> None:
    """The shared ones through the real parser; a script's own by its text."""
    for (what, name), (script, *_) in peers._SCRIPTS.items():
        config = CONFIG if what == "train" else DECODE
        options = [text for text in peers.command(name, config, None)[2:] if text[:2] == "--"]
        parser = common.parser("", batch=1, seq_len=2, steps=3)
        known = {option for action in parser._actions for option in action.option_strings}
        tree = ast.parse((peers.FOLDER / script).read_text())
        own = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
        assert set(options) <= known | own


def test_both_sides_draw_the_same_tokens_and_name_the_same_keys(common: ModuleType) -> None:
    np.testing.assert_array_equal(common.zipf_tokens(999, 500, 3), zipf_tokens(999, 500, 3))
    assert common.ROW_KEYS == ROW_KEYS
    ours = to_json(gemma3_270m())
    assert {name: ours[name] for name in common.GEMMA3_270M} == common.GEMMA3_270M
    assert common.letters({"attn_pattern": "LLG", "num_layers": 4}) == "LLGL"


def test_a_row_of_a_peer_is_like_ours(common: ModuleType) -> None:
    options = common.parser("", batch=4, seq_len=16, steps=2).parse_args([])
    row = common.row(options, "train", [1.0, 2.0, 4.0], 128, 2, loss=1.5)
    assert tuple(row) == ROW_KEYS
    assert row["seconds"] == {"median": 1.0, "min": 0.5, "max": 2.0}
    assert row["tokens_per_s"] == {"median": 64.0, "min": 32.0, "max": 128.0}
    assert (row["loss"], row["mfu"], row["compute_dtype"]) == (1.5, None, "bfloat16")


def stand_in(folder: Path, body: str) -> str:
    """An interpreter that takes a script's command line and does `body` instead."""
    path = folder / "python"
    path.write_text(f"#!{sys.executable}\nimport json, sys\n{body}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


ROW = (
    f"row = dict.fromkeys({ROW_KEYS!r})\n"
    + """
given = dict(zip(sys.argv[2::2], sys.argv[3::2]))
row |= {"what": "train", "batch": int(given["--batch"]), "seq_len": int(given["--seq-len"])}
row["tokens_per_s"] = {"median": 0.5, "min": 0.5, "max": 0.5}
print("some library says hello")
print(json.dumps({"name": "x", "device": "1 x cpu", "versions": {}, "rows": [row]}))
"""
)


def test_a_peer_is_compared_row_by_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ours(config: BenchConfig) -> list[dict[str, Any]]:
        rate = {"tokens_per_s": {"median": 24.0, "min": 1.0, "max": 30.0}}
        own = {"what": "train", "batch": config.batch, "seq_len": config.seq_len}
        return [dict.fromkeys(ROW_KEYS) | own | rate]

    monkeypatch.setitem(run._KINDS, "train", ours)
    value = run.bench([CONFIG], against=["hf"], peer_python=stand_in(tmp_path, ROW))
    (peer,) = value["peers"]
    assert (peer["name"], len(peer["rows"])) == ("hf", 1)
    # 24 tokens/s on eight devices are 3 on each, and the peer has one.
    assert value["ratios"] == {"hf": [{"what": "train", "batch": 8, "ratio": 6.0}]}


FAILURES = {
    "sys.exit('ModuleNotFoundError: no torch.')": "no torch",
    "print('no json')": "no result",
    "print('{}')": "'rows'",
    "print(json.dumps({'rows': [{'what': 1}]}))": "rows lack batch",
    "pass": "no result",
}


@pytest.mark.parametrize("body", FAILURES)
def test_a_peer_that_fails_is_one_sentence(body: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"'hf' failed .*{FAILURES[body]}.* hf_train.py by hand"):
        peers.run("hf", CONFIG, stand_in(tmp_path, body))
