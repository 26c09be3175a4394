"""`generate --file`: what its lines may say, and the line of whatever is wrong."""

import json

import pytest
from models import config, make_adapter, make_run

from gemma_jax import cli
from gemma_jax.tuning.lora import Lora


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The working directory of these tests, with a model and two adapters."""
    path = tmp_path_factory.mktemp("files")
    sizes = {"embed_dim": 32, "mlp_dim": 64, "num_layers": 2, "head_dim": 8, "attn_pattern": "LG"}
    make_run(path / "base", config(**sizes, max_seq_len=64))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        for seed, name in enumerate(("one", "two")):
            make_adapter(path / name, path / "base", Lora(rank=2, alpha=64.0), seed=seed)
        yield path


def written(folder, capsys, *lines, options=()):
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / "asked.jsonl").write_text(text)
    cli.main(["generate", "base", "--file", "asked.jsonl", "--max-new-tokens", "4", *options])
    return capsys.readouterr().out


def user(text):
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"messages": [{"role": "robot", "content": "x"}]}, "message 1 has the role 'robot'"),
        ({"messages": user("a") * 2}, "message 2 is of the user"),
        ({"messages": []}, "the conversation has no user message"),
        ({"messages": user("\ud800")}, "message 1 holds half a surrogate pair"),
        ({"messages": user(3)}, "message 1 has a content of type int"),
        ({"prompt": "\ud800"}, "the prompt holds half a surrogate pair"),
        ({"prompt": "a b c " * 40}, "tokens and 4 new ones leave the model's context of 64"),
        ({"prompt": "a", "temperature": 0}, "has an unknown 'temperature'; a line may have"),
        ({"prompt": "a", "completion": "b"}, "has an unknown 'completion'"),
        ({"prompt": "a", "messages": []}, "must have either a text `prompt` or a list"),
        ({"prompt": ["a"]}, "must have either a text `prompt` or a list"),
        ('{"prompt": "a", "prompt": "b"}', "has 'prompt' twice in one object"),
        ('{"prompt": ', "is not JSON"),
        ("[" * 100_000, "nested too deeply"),
        ({"prompt": "a", "adapter": "one"}, "there is no adapter 'one'; none was given"),
        ({"prompt": "a", "adapter": 1}, "adapter=1 must be the name of one"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(folder, capsys, line, message):
    with pytest.raises(SystemExit) as end:
        written(folder, capsys, {"prompt": "fine"}, "", line)  # a blank line counts
    assert end.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "asked.jsonl line 3" in error
    assert message in error


def test_a_grammar_is_refused_with_its_line(folder, capsys):
    fine = {"prompt": "a", "regex": "a"}
    for own, message in (
        ({"schema": {"not": {}}}, 'the schema uses "not"'),
        ({"schema": 3}, "the schema is 3"),
        ({"regex": 3}, "regex=3 must be a text"),
        ({"grammar": "start: x"}, 'unknown name: "x"'),
        ({"regex": "a", "schema": True}, "bound to schema and regex at once"),
        ({}, "has no schema, regex or grammar, and others have"),
    ):
        with pytest.raises(SystemExit):
            written(folder, capsys, fine, "", {"prompt": "a", **own})
        error = capsys.readouterr().err.splitlines()[-1]
        assert "asked.jsonl line 3" in error
        assert message in error


def test_lines_end_at_newlines_alone(folder, capsys):
    line = json.dumps({"prompt": "a\u2028b\x85c"}, ensure_ascii=False)
    rows = json.loads(written(folder, capsys, f"\ufeff{line}\r", line, options=["--json"]))
    assert [row["prompt"] for row in rows] == ["a\u2028b\x85c"] * 2


def test_a_line_that_names_no_adapter_has_the_only_one(folder, capsys):
    greedy = ["--temperature", "0", "--json"]
    asked = {"prompt": "a"}, {"prompt": "a", "adapter": None}, {"prompt": "a", "adapter": "one"}
    texts = [
        row["text"]
        for row in json.loads(
            written(folder, capsys, *asked, options=["--adapter", "one", *greedy])
        )
    ]
    assert texts[0] == texts[2] != texts[1]
    for line, text in zip(asked[:2], texts, strict=False):  # alone, as it is written
        alone = written(folder, capsys, line, options=["--adapter", "one", *greedy[:2]])
        assert alone == f"a{text}\n"
    with pytest.raises(SystemExit):
        written(folder, capsys, *asked, options=["--adapter", "one", "--adapter", "two"])
    error = capsys.readouterr().err
    assert "asked.jsonl line 1 names no adapter, and there are one, two" in error


def test_what_is_no_file_is_refused(folder, capsys):
    for name in ("nowhere.jsonl", "base"):
        with pytest.raises(SystemExit) as end:
            cli.main(["generate", "base", "--file", name])
        assert end.value.code == 2
        assert f"{name} cannot be read: it is no file" in capsys.readouterr().err
