"""Files of examples: what is read, and a sentence with the line for everything wrong."""

import gzip
import json

import pytest
from example_files import CHOICES, PAIRS, ready, write

from gemma_jax.errors import UserError
from gemma_jax.eval.examples import read_examples, read_task


def test_examples_before_a_question_are_not_scored(tmp_path):
    path = write(tmp_path / "choices.jsonl", CHOICES)
    task = read_task(path, shots=1)
    assert (len(task.examples), task.shots) == (2, 1)
    assert task.examples[0].pairs[0][0] == "def f(x): return x\n\nQuestion: why?\n"
    with pytest.raises(UserError, match="3 examples to take 3 from"):
        read_task(path, shots=3)
    with pytest.raises(UserError, match="pairs of sentences"):
        read_task(write(tmp_path / "pairs.jsonl", PAIRS), shots=1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"query": "a", "choices": ["b", "c"], "gold": 2}', r"line 1 has gold=2, .* in 0..1\."),
        ('{"query": "a", "choices": ["b", "c"], "gold": true}', "line 1 has gold=True"),
        ('{"query": "a", "choices": [], "gold": 0}', r"line 1 has choices=\[\]"),
        ('{"query": "a", "choices": ["b", 3], "gold": 0}', "line 1 has 3 in choices"),
        (r'{"good": "\ud800", "bad": "b"}', r"line 1 has good='\\ud800'"),
        ('{"choices": ["b"], "gold": 0}', "line 1 has query=None"),
        ('{"context_options": ["b"], "continuation": "c"}', "line 1 has gold=None"),
        ('{"good": "a", "bad": ""}', "line 1 has bad=''"),
        ('{"good": "a", "bad": "b"}\n{"context": "a", "continuation": "b"}', "line 2 is of the ki"),
        ('{"good": "a", "bad": "b"}\n\n{"good": ', "line 3 is not valid JSON"),
        ("[1]", "line 1 is not a JSON object"),
        ('{"text": "a"}', "line 1 has the fields text, which make no example"),
        ("\n", "holds no examples"),
        ('{"request": {"context": "a", "continuation": "b"}}', "line 1 has no request and doc_id"),
        (json.dumps(ready(0, 1, "a", "b", 0)), "line 1 has idx 1 where 0 should follow"),
    ],
)
def test_a_bad_line_is_named(tmp_path, text, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as refusal:
        read_examples(path)
    assert str(path) in str(refusal.value)


def test_a_broken_file_is_named(tmp_path):
    path = tmp_path / "bad.jsonl.gz"
    whole = gzip.compress(b'{"good": "a", "bad": "b"}\n' * 999)
    for broken in (whole[:-20], whole[:20] + b"xxxxxxxx" + whole[28:], b"no gzip at all"):
        path.write_bytes(broken)
        with pytest.raises(UserError, match=r"bad\.jsonl\.gz is damaged or cut short"):
            read_examples(path)
    path.with_suffix("").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="is not UTF-8"):
        read_examples(path.with_suffix(""))
