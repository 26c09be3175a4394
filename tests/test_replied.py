"""Replies to held-out conversations: what is asked, how it is scored, and the verb."""

import json
import math
import re

import jsonschema
import numpy as np
import pytest
from models import TOKENIZER, config, make_run

from gemma_jax import cli, runs
from gemma_jax.data.chat import encode_chat
from gemma_jax.data.conversations import read_all
from gemma_jax.data.tokenizer import BOS, Tokenizer
from gemma_jax.errors import UserError
from gemma_jax.eval.replies import encode_prompts, score_reply, totals
from gemma_jax.exchange import export_model, import_model
from gemma_jax.replied import evaluate_replies
from gemma_jax.trained import evaluate
from gemma_jax.tuning.qat import Qat

SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["n"],
    "additionalProperties": False,
}
SCORER = """
import json

def hits(line, reply):
    return {"f1": (2.0 * (reply == line["completion"]), 2.0), "length": len(reply)}

def bad(line, reply):
    return (1.0, float("nan"))

def wrong(line, reply):
    return line["nothing"]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The working directory: a run, conversations, a schema and a scorer."""
    path = tmp_path_factory.mktemp("work")
    make_run(path / "base", config())
    rows = [{"prompt": f"say {i}", "completion": json.dumps({"n": i})} for i in range(12)]
    (path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "schema.json").write_text(json.dumps(SCHEMA))
    (path / "tuple.json").write_text('{"items": [{"type": "string"}]}')
    (path / "scorer.py").write_text(SCORER)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        yield path


@pytest.fixture(scope="module")
def loaded(folder):
    return runs.load_model("base")


def test_shots_are_earlier_turns_or_plain_text(folder) -> None:
    tokenizer = Tokenizer.load(TOKENIZER)
    lines = [
        {"messages": [{"role": r, "content": t} for r, t in turns]}
        for turns in (
            [("system", "Be brief."), ("user", "a"), ("assistant", "b")],
            [("system", "Be brief."), ("user", "c"), ("assistant", "d")],
        )
    ]
    (folder / "two.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shot, asked = read_all(("two.jsonl",), tokenizer)
    (chat,) = encode_prompts(tokenizer, [asked], shots=[shot])
    turns = [("user", "Be brief.\n\na"), ("assistant", "b"), ("user", "Be brief.\n\nc")]
    wanted = [{"role": role, "content": text} for role, text in turns]
    assert chat == encode_chat(tokenizer, wanted, add_generation_prompt=True)
    (text,) = encode_prompts(tokenizer, [asked], shots=[shot], prompt_format="text")
    assert text[0] == BOS
    assert tokenizer.decode(text[1:]) == "Be brief.\n\na\nb\n\nBe brief.\n\nc\n"


def test_a_ratio_of_sums_and_its_standard_error() -> None:
    """Against the spread over drawn sets of the same size."""
    rng = np.random.default_rng(0)
    weight = rng.integers(0, 6, 400)
    total = rng.binomial(weight, 0.7)
    pairs = zip(total.tolist(), weight.tolist(), strict=True)
    rows = [{"f1": (t, w), "mean": (t, 1)} for t, w in pairs]
    found = totals(rows)
    assert found["f1"]["value"] == total.sum() / weight.sum()
    np.testing.assert_allclose(found["mean"]["stderr"], total.std(ddof=1) / 20)
    drawn = [rng.integers(0, 400, 400) for _ in range(4000)]
    spread = np.std([total[i].sum() / weight[i].sum() for i in drawn])
    np.testing.assert_allclose(found["f1"]["stderr"], spread, rtol=0.06)
    assert totals([{"f1": (0.0, 0.0)}])["f1"] == {"value": 0.0, "stderr": None}


def test_a_scorer_that_gives_no_number_is_refused(folder) -> None:
    one = read_all(("a.jsonl",), Tokenizer.load(TOKENIZER))[0]
    for value in ("no", (1.0, math.nan), {"a": (1.0, -1.0)}, None):
        with pytest.raises(UserError, match=r"scorer returns .* for a\.jsonl line 1"):
            score_reply(lambda line, reply, value=value: value, one, "x")


def test_bound_replies_are_valid_and_free_ones_are_judged(loaded, folder) -> None:
    bound = evaluate_replies(
        loaded, "a.jsonl", schema="schema.json", max_new_tokens=16, replies="r.jsonl"
    )
    assert bound["metrics"]["valid"] == {"value": 1.0, "stderr": 0.0}
    lines = [json.loads(line) for line in (folder / "r.jsonl").read_text().splitlines()]
    assert [line["wanted"] for line in lines] == [json.dumps({"n": i}) for i in range(12)]
    for line in lines:
        jsonschema.validate(json.loads(line["reply"]), SCHEMA)
    free = evaluate_replies(loaded, "a.jsonl", schema=SCHEMA, bound=False, max_new_tokens=8)
    assert free["metrics"]["json"]["value"] == 0  # the weights are random
    assert not free["bound"]
    assert free["ended"] <= free["examples"]


def test_the_verb(folder, capsys) -> None:
    line = "eval base --conversations a.jsonl --schema schema.json --scorer scorer.py:hits"
    line += " --max-new-tokens 16"
    cli.main(f"{line} --few-shot a.jsonl:2 --limit 3 --output o.json --json".split())
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((folder / "o.json").read_text())
    assert found["examples"] == 3
    assert found["shots"] == 2
    assert {"f1", "length", "exact_match", "json", "valid"} <= found["metrics"].keys()
    cli.main([*line.split(), "--limit", "2", "--prompt-format", "text"])
    assert "2 replies, bound to the schema" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--conversations a.jsonl --free", "--free is about a schema"),
        ("--tasks piqa --schema schema.json", "--schema is for conversations"),
        ("--conversations a.jsonl --few-shot a.jsonl", "'a.jsonl' must be FILE:K"),
        ("--conversations a.jsonl --few-shot a.jsonl:13", "asks for 13 conversations"),
        ("--conversations a.jsonl --scorer scorer.py", "'scorer.py' must be FILE.py:FUNCTION"),
        ("--conversations a.jsonl --scorer scorer.py:no", "scorer.py defines no function no"),
        (
            "--conversations a.jsonl --max-new-tokens 9 --scorer scorer.py:bad",
            "a pair .total, weight. of them",
        ),
        (
            "--conversations a.jsonl --max-new-tokens 9 --scorer scorer.py:wrong",
            r"the scorer fails on a\.jsonl line 1 \(KeyError: 'nothing', at .*scorer.py line 11\)",
        ),
        ("--conversations a.jsonl --schema no.json", "no.json does not exist"),
        ("--conversations a.jsonl --schema tuple.json", "the items is .*, which no schema of"),
        (
            "--conversations a.jsonl --max-new-tokens 300",
            r"a\.jsonl line 1: a prompt of .* leave the model's context",
        ),
    ],
)
def test_bad_commands_are_refused(folder, options, message, capsys) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["eval", "base", *options.split()])
    assert end.value.code == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("scheme", ["q4_0", "int4", "sfp8"])
def test_rounded_weights_score_text_too(folder, scheme) -> None:
    """In Q4_0 as the exported file does, read again."""
    (folder / "text.txt").write_text("one two three four five six seven\n" * 20)
    whole = evaluate("base", sources=("text.txt",), seq_len=32)
    found = evaluate("base", sources=("text.txt",), seq_len=32, quantization=Qat(scheme=scheme))
    assert found["loss"] != whole["loss"]
    if scheme == "q4_0":
        export_model("base", "base.gguf", format="gguf", dtype="q4_0")
        import_model("base.gguf", "again")
        again = evaluate("again", sources=("text.txt",), seq_len=32, compute_dtype="float32")
        assert again["loss"] == found["loss"]
