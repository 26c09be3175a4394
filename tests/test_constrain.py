"""Texts bound to a grammar, from a model that knows nothing: each of them must belong to it."""

import json
import random
import re
from collections import Counter

import jsonschema
import numpy as np
import pytest
from models import config, make_run
from reference import Reference
from schemas import random_schema

from gemma_jax import cli, runs
from gemma_jax.data.tokenizer import BOS
from gemma_jax.errors import UserError
from gemma_jax.generation.constrain import write_bound_texts
from gemma_jax.generation.decode import Generator
from gemma_jax.generation.grammar import (
    GrammarMatcher,
    GrammarTokenizer,
    json_schema,
    lark,
    regex,
)
from gemma_jax.generation.sampling import Sampling
from gemma_jax.interop.tokenizers import from_gguf, to_gguf

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 2, "maxLength": 12},
        "born": {"type": "string", "format": "date"},
        "role": {"enum": ["reader", "writer"]},
        "tags": {"type": "array", "items": {"type": "integer"}, "maxItems": 3},
    },
    "required": ["name", "born", "role"],
    "additionalProperties": False,
}
SCHEMAS = [
    PERSON,
    {"type": "array", "items": {"anyOf": [{"type": "null"}, {"type": "boolean"}]}, "minItems": 2},
    {"const": {"a": [1, None, "é"]}},
    {"type": "string", "pattern": "^(ab)*c[0-9]{3}$"},
    {
        "$defs": {"t": {"type": "object", "properties": {"l": {"$ref": "#/$defs/t"}}}},
        "$ref": "#/$defs/t",
    },
    {"type": "number", "minimum": -2, "exclusiveMaximum": 17},
    {"type": "object", "additionalProperties": {"type": "boolean"}, "maxProperties": 2},
    {"type": "object", "properties": {"x": {"type": ["string", "null"]}}, "required": ["x"]},
]
WILD = Sampling(temperature=1.5)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    small = config(
        embed_dim=32, mlp_dim=64, num_layers=2, head_dim=8, attn_pattern="LG", max_seq_len=256
    )
    return runs.load_model(make_run(tmp_path_factory.mktemp("bound") / "random", small))


@pytest.fixture(scope="module")
def pieces(loaded):
    return GrammarTokenizer(loaded.tokenizer, loaded.model.config.vocab_size)


@pytest.fixture(scope="module")
def generator(loaded):
    return Generator(loaded.model, loaded.params)


@pytest.fixture(scope="module")
def reference(loaded):
    return Reference(loaded.model, loaded.params, 256)


@pytest.fixture(scope="module")
def write(loaded, generator, pieces):
    def run(grammars, **settings):
        prompts = [[BOS, *loaded.tokenizer.encode(f"number {i}")] for i in range(len(grammars))]
        return write_bound_texts(generator, loaded.tokenizer, pieces, prompts, grammars, **settings)

    run.pieces = pieces
    return run


def check(schema, text):
    formats = jsonschema.FormatChecker(formats=["date", "uuid", "ipv4", "email"])
    jsonschema.validate(json.loads(text), schema, format_checker=formats)


@pytest.mark.parametrize("limit", [8, 40, 120])
def test_every_text_of_a_batch_is_valid_for_its_own_schema(write, loaded, limit):
    results = write([json_schema(s) for s in SCHEMAS], max_new_tokens=limit, sampling=WILD)
    for schema, result in zip(SCHEMAS, results, strict=True):
        assert len(result.tokens) == len(result.logprobs) <= limit
        assert loaded.tokenizer.decode(result.tokens) == result.text
        if result.ending == "cut":  # the shortest of these has more tokens than the limit
            assert limit == 8 or (limit == 40 and schema is PERSON)
        else:
            check(schema, result.text)
    if limit == 120:
        assert {result.ending for result in results} == {"complete", "closed"}


@pytest.mark.slow
def test_hundreds_of_schemas_are_obeyed(write):
    """Of an untrained model at a high temperature, cut short or not, each text is valid."""
    rng = random.Random(0)
    schemas = [random_schema(rng) for _ in range(384)]
    endings = Counter()
    for start in range(0, len(schemas), 32):
        part = schemas[start : start + 32]
        results = write([json_schema(s) for s in part], max_new_tokens=96, sampling=WILD)
        for schema, result in zip(part, results, strict=True):
            endings[result.ending] += 1
            if result.ending == "cut":  # there is no text of so few tokens
                assert GrammarMatcher(json_schema(schema), write.pieces).close(96) is None
            else:
                check(schema, result.text)
    assert endings["complete"] > 200
    assert endings["closed"] > 50
    assert endings["cut"] < 20


def test_a_limit_may_cut_instead(write):
    long = [json_schema({"type": "string", "minLength": 3})]
    (closed,) = write(long, max_new_tokens=6, sampling=WILD)
    (cut,) = write(long, max_new_tokens=6, sampling=WILD, on_limit="cut")
    assert (closed.ending, cut.ending) == ("closed", "cut")
    assert closed.tokens[:5] == cut.tokens[:5]
    assert json.loads(closed.text) == json.loads(cut.text[: len(closed.text) - 1] + '"')


def test_regular_expressions_and_grammars(write):
    pattern, sums = r"[A-Z]{2}-\d{1,4}(, (yes|no))?", 'start: n ("+" n)* "=" n\nn: /[0-9]{1,3}/'
    results = write([regex(pattern), lark(sums)] * 2, max_new_tokens=30, sampling=WILD)
    for result, form in zip(results, [pattern, r"\d{1,3}(\+\d{1,3})*=\d{1,3}"] * 2, strict=True):
        assert re.fullmatch(form, result.text), result


def test_a_text_does_not_depend_on_its_batch(write, loaded, generator, pieces):
    grammars = [json_schema(s) for s in SCHEMAS[:4]]
    together = write(grammars, max_new_tokens=40, seeds=[3, 4, 5, 6])
    for i, grammar in enumerate(grammars):
        prompt = [BOS, *loaded.tokenizer.encode(f"number {i}")]
        (alone,) = write_bound_texts(
            generator,
            loaded.tokenizer,
            pieces,
            [prompt],
            [grammar],
            max_new_tokens=40,
            seeds=[3 + i],
        )
        assert alone.tokens == together[i].tokens
        for here, there in zip(alone.logprobs, together[i].logprobs, strict=True):
            assert here == (there if there is None else pytest.approx(there, abs=1e-4))


def test_drawn_tokens_have_the_models_log_probabilities(write, loaded, reference):
    (result,) = write([json_schema(PERSON)], max_new_tokens=60, sampling=Sampling(temperature=0))
    prompt = [BOS, *loaded.tokenizer.encode("number 0")]
    logprobs = reference.all([*prompt, *result.tokens])
    drawn = [i for i, value in enumerate(result.logprobs) if value is not None]
    assert 0 < len(drawn) < len(result.tokens)  # forced ones have none
    for i in drawn:
        expected = logprobs[len(prompt) + i - 1, result.tokens[i]]
        assert result.logprobs[i] == pytest.approx(expected, abs=1e-4)


def test_a_way_to_the_end_is_found_from_anywhere(loaded, pieces):
    rng = random.Random(0)
    for schema in SCHEMAS:
        for steps in (1, 5, 20, 60):
            matcher = GrammarMatcher(json_schema(schema), pieces)
            while len(matcher.tokens) < steps and not matcher.finished:
                bits = np.frombuffer(matcher._inner.compute_bitmask(), np.uint8)
                ids = np.flatnonzero(np.unpackbits(bits, bitorder="little"))
                matcher.take(matcher.forced() or [int(rng.choice(ids[ids > 106]))])
            tokens = matcher.close(len(matcher.tokens) + 200)
            check(schema, loaded.tokenizer.decode(tokens))


def test_a_foreign_tokenizer_spells_what_it_would_read_as_a_space(loaded):
    fields = to_gguf(loaded.tokenizer)
    del fields["gemma_jax.exact_tokenizer"]
    foreign = from_gguf(fields, "a.gguf")
    wanted = "▁a▁▁ b"
    matcher = GrammarMatcher(
        json_schema({"const": wanted}), GrammarTokenizer(foreign, foreign.vocab_size)
    )
    while not matcher.finished:
        matcher.take(matcher.forced())
    assert json.loads(foreign.decode(matcher.tokens)) == wanted


def _nested(depth):
    schema = {}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize("pattern", ["[0-9]{3}", "^a|b$", "^[^}]*x$"])
def test_a_pattern_that_is_not_met_yet_is_met_at_the_end(write, pattern):
    (result,) = write(
        [json_schema({"type": "string", "pattern": pattern})], max_new_tokens=60, sampling=WILD
    )
    assert result.ending in ("closed", "complete")
    assert re.search(pattern, json.loads(result.text))


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        (lambda: json_schema({"not": {}}), 'the schema uses "not", which'),
        (lambda: json_schema({"type": "array", "contains": {}}), 'uses "contains"'),
        (lambda: json_schema({"oneOf": [{"minimum": 1}, {"maximum": 2}]}), 'uses "oneOf", which'),
        (
            lambda: json_schema({"type": "string", "format": "regex"}),
            'uses "format": "regex", which',
        ),
        (lambda: json_schema({"minLength": 3, "maxLength": 1, "type": "string"}), "minLength"),
        (lambda: json_schema(False), "the schema is false, which no value meets"),
        (lambda: json_schema({"type": "strng"}), 'the type is "strng", which no schema'),
        (lambda: json_schema({"$ref": "#/$defs/x"}), "/x' does not exist"),
        (lambda: json_schema("{"), "the schema is not valid JSON"),
        (lambda: json_schema({"const": "\ud800"}), "the schema holds what JSON cannot"),
        (lambda: json_schema({"const": float("nan")}), "the schema holds what JSON cannot"),
        (lambda: json_schema({"enum": [{1, 2}]}), "the schema holds what JSON cannot"),
        (
            lambda: json_schema({"items": [True]}),
            "the items is .*true.*, which no schema of .*2020",
        ),
        (lambda: json_schema({"enum": [2**53 + 1]}), "the schema has 9007199254740993 in enum"),
        (lambda: json_schema({"const": {"a": [1e300]}}), r"the schema has 1e\+300 in const"),
        (lambda: json_schema({"minimum": 10**30}), "the schema has 10+ in minimum, beyond"),
        (lambda: json_schema({"multipleOf": 0.1}), "the schema uses multipleOf=0.1"),
        (lambda: json_schema({"x-guidance": {"lenient": True}, "not": {}}), "uses x-guidance"),
        (lambda: json_schema({"pattern": "[+--]"}), r"has -- in a class, .* write \\-"),
        (lambda: json_schema(_nested(3000)), "the schema is nested too deeply"),
        (lambda: regex("\udc00"), "the regular expression holds half a surrogate pair"),
        (lambda: lark('start: "\udc00"'), "the grammar holds half a surrogate pair"),
        (lambda: json_schema("3"), "the schema is 3; a schema is an object or true"),
        (lambda: regex("a(b"), "the regular expression cannot be obeyed: .*unclosed group"),
        (lambda: regex("(?=a)b"), "look-around"),
        (lambda: regex("a\\"), r"the expression 'a.*' ends with a lone \\; write"),
        (lambda: lark("start: foo"), 'unknown name: "foo"'),
    ],
)
def test_what_cannot_be_obeyed_is_named(pieces, grammar, message):
    with pytest.raises(UserError, match=message) as error:
        GrammarMatcher(grammar(), pieces)
    assert "\n" not in str(error.value)


def test_a_grammar_without_an_end_is_refused_where_it_grows_too_large(write):
    with pytest.raises(UserError, match=r"the grammar cannot be obeyed: .*Too many items") as error:
        write([lark('start: "x" start')], max_new_tokens=4)
    assert "\n" not in str(error.value)
    endless = {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}
    with pytest.raises(UserError, match=r"prompt 2: the schema cannot be obeyed: .*Too many items"):
        write([regex("a"), json_schema(endless)], max_new_tokens=4)
    with pytest.raises(UserError, match='prompt 2: the schema uses "not"'):
        write([regex("a"), json_schema({"not": {}})], max_new_tokens=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    small = config(
        embed_dim=32, mlp_dim=64, num_layers=2, head_dim=8, attn_pattern="LG", max_seq_len=256
    )
    path = tmp_path_factory.mktemp("command")
    make_run(path / "run", small)
    (path / "person.json").write_text(json.dumps(PERSON))
    return path


def rows(capsys, folder, *options):
    cli.main(["generate", str(folder / "run"), "--json", "--max-new-tokens", "100", *options])
    return json.loads(capsys.readouterr().out)


def test_one_schema_for_all(folder, capsys):
    prompts = ["--prompt", "a", "--prompt", "b", "--schema", str(folder / "person.json")]
    found = rows(capsys, folder, *prompts, "--temperature", "1.5", "--logprobs")
    assert [row["prompt"] for row in found] == ["a", "b"]
    for row in found:
        check(PERSON, row["text"])
        assert row["ending"] in ("complete", "closed")
        assert len(row["tokens"]) == len(row["logprobs"])


def test_each_line_of_a_file_has_its_own(folder, capsys):
    lines = [
        {"prompt": "a", "schema": PERSON},
        {"messages": [{"role": "user", "content": "b"}], "regex": "[a-c]{3}"},
        {"prompt": "c", "grammar": 'start: "x" | "y"'},
    ]
    file = folder / "asked.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    person, letters, one = rows(capsys, folder, "--file", str(file))
    check(PERSON, person["text"])
    assert re.fullmatch("[a-c]{3}", letters["text"])
    assert one["text"] in ("x", "y")
    file.write_text("\n".join(map(json.dumps, [*lines, {"prompt": "free"}])))
    with pytest.raises(SystemExit):
        rows(capsys, folder, "--file", str(file))
    assert re.search(r"asked.jsonl line 4 has no schema", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "a", "--schema", "none.json"], "none.json cannot be read"),
        (["--prompt", "a", "--regex", "a", "--stop", "b"], "leave --stop out"),
        (["--chat", "--regex", "a"], "--chat is not bound"),
        (["--prompt", "a", "--regex", "a("], "regular expression cannot be obeyed"),
    ],
)
def test_what_does_not_go_together_is_refused(folder, capsys, options, message):
    with pytest.raises(SystemExit):
        rows(capsys, folder, *options)
    assert message in capsys.readouterr().err
