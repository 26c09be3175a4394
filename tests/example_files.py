"""Small files of examples for tests of tasks."""

import gzip
import json
import lzma

CHOICES = [
    {"query": "def f(x):", "choices": ["return x", "import", "a b c d e f g"], "gold": 0},
    {"query": "Question: why?\n", "choices": ["because", "no"], "gold": 1},
    {"query": "The sky is", "choices": ["blue", "a very long answer", "x"], "gold": 2},
]
PAIRS = [
    {"good": "He runs.", "bad": "He run.", "uid": "agreement", "field": "morphology"},
    {"good": "They run.", "bad": "They runs.", "uid": "agreement", "field": "morphology"},
    {"good": "Who left?", "bad": "Left who?", "uid": "order", "field": "syntax"},
]


def write(path, lines):
    text = "".join(json.dumps(line) + "\n" for line in lines)
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    with opener(path, "wt") as file:
        file.write(text)
    return path


def ready(doc, idx, context, continuation, label):
    request = {"context": context, "continuation": continuation}
    return {"request": request, "doc_id": doc, "idx": idx, "label": label}
