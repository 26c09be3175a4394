"""What a schema or an expression allows here is allowed by other programs that read it, too."""

import json
import re

import pytest
from models import TOKENIZER

from gemma_jax.data.tokenizer import Tokenizer
from gemma_jax.errors import UserError
from gemma_jax.generation.grammar import GrammarMatcher, GrammarTokenizer, json_schema, regex
from gemma_jax.generation.schemas import check_schema, is_valid


@pytest.fixture(scope="module")
def pieces():
    tokenizer = Tokenizer.load(TOKENIZER)
    return GrammarTokenizer(tokenizer, tokenizer.vocab_size)


def takes(pieces, grammar, text):
    """Whether a text belongs to a grammar."""
    matcher = GrammarMatcher(grammar, pieces)
    tokens = pieces(text)
    if matcher._inner.validate_tokens(tokens) < len(tokens):
        return False
    matcher.take(tokens)
    return matcher.complete


LETTERS = "aZ_0é\u0663\xb2\u0301\u200d \xa0\x85\u2028\ufeff\n\r\x0b\x1c-[&~.@\u216f\U0001f642"
CLASSES = (r"\w", r"\W", r"\d", r"\D", r"\s", r"\S", r"[^\w]", r"[^\W]", r"[^\d]", r"[^\s@]")
CLASSES += (r"[\w.-]", r"[]\s]", r"[^]\W_]", r"[\S]", r".", r"[.]", r"[[a]", r"[a&&b]", r"[~~-]")


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of Python's plans for some of these
@pytest.mark.parametrize("pattern", CLASSES)
def test_what_a_class_takes_matches_in_python_too(pieces, pattern):
    """And in ECMAScript: there \\w and \\d are ASCII, and a dot takes no end of a line."""
    found = [c for c in LETTERS if re.search(f"^(?:{pattern})$", c)]
    schema = json_schema({"type": "string", "pattern": f"^(?:{pattern})$"})
    taken = [c for c in LETTERS if takes(pieces, schema, json.dumps(c, ensure_ascii=c < " "))]
    assert taken
    assert set(taken) <= set(found)
    assert {c for c in found if " " < c < "\x7f"} <= set(taken)
    if pattern not in ("[[a]", "[a&&b]", "[~~-]"):  # operators in Rust's own syntax
        plain = [c for c in LETTERS if takes(pieces, regex(pattern), c)]
        assert set(plain) <= set(found)
        assert {c for c in found if " " < c < "\x7f"} <= set(plain)
    if pattern in (r"\w", r"\d"):
        assert all(c.isascii() for c in taken)


def test_formats_allow_what_there_is(pieces):
    cases = {
        "date": (
            ["2024-02-29", "2000-02-29", "0001-01-01", "2023-12-31", "9999-02-28", "0400-02-29"],
            ["2023-02-29", "1900-02-29", "0000-01-01", "2023-04-31", "2024-02-30", "2023-13-01"],
        ),
        "time": (["12:00:00Z", "23:59:59.5+01:00"], ["12:00:60Z", "12:00:00z", "12:00:00"]),
        "date-time": (
            ["2024-02-29T00:00:00Z"],
            ["2023-02-29T00:00:00Z", "2016-12-31T23:59:60Z", "2024-01-01t00:00:00Z"],
        ),
    }
    for name, (good, bad) in cases.items():
        for schema in ({"type": "string", "format": name}, {"allOf": [{"format": name}]}):
            grammar = json_schema(schema)
            for text in (*good, *bad):
                taken = takes(pieces, grammar, json.dumps(text))
                assert taken == (text in good), text


def test_values_are_judged_by_the_draft_that_a_schema_names():
    seventh = {"$schema": "http://json-schema.org/draft-07/schema#", "items": [{"type": "null"}]}
    check_schema(seventh)
    assert is_valid(seventh, [None, 1])
    assert not is_valid(seventh, [1])
    for schema, value in (({"pattern": r"\p{Lu}"}, "a"), ({"$ref": "http://a.example/x"}, 1)):
        check_schema(schema)
        with pytest.raises(UserError, match="the schema cannot be checked here: "):
            is_valid(schema, value)


def test_bounds_beyond_what_is_exact_are_drawn_in(pieces):
    schema = json_schema({"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1})
    for value, wanted in ((2**53, True), (-(2**53), True), (2**53 + 1, False), (2**63, False)):
        assert takes(pieces, schema, str(value)) == wanted
