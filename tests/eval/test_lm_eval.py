"""The adapter: tasks of lm-evaluation-harness on local files give our own numbers."""

import json
import warnings

import pytest
from reference import Reference

from gemma_jax.data.tokenizer import BOS
from gemma_jax.trained import evaluate_tasks, lm_eval_model

# Importing it warns of much that is not ours.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    harness = pytest.importorskip("lm_eval")

pytestmark = pytest.mark.filterwarnings("ignore")

LINES = [
    {"query": "def f(x):", "choices": ["return x", "import", "a b c d e f g"], "gold": 0},
    {"query": "Question: why?", "choices": ["because", "no", "x = 1"], "gold": 1},
    {"query": "The sky is", "choices": ["blue", "a very long answer", "x"], "gold": 2},
    {"query": "One and", "choices": ["two", "three of them", "for"], "gold": 0},
]


@pytest.fixture(scope="module")
def model(folder):
    return lm_eval_model(folder, compute_dtype="float32", batch_tokens=256)


def run(model, path, **settings):
    task = {
        "task": "local",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test",
        "doc_to_text": "query",
        **settings,
    }
    return harness.simple_evaluate(model, tasks=[task], bootstrap_iters=100)


def test_choices_score_the_same(model, folder, tmp_path):
    path = tmp_path / "choices.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    metrics = [{"metric": "acc"}, {"metric": "acc_norm"}]
    theirs = run(
        model,
        path,
        output_type="multiple_choice",
        doc_to_choice="choices",
        doc_to_target="gold",
        metric_list=metrics,
    )["results"]["local"]
    ours = evaluate_tasks(folder, [str(path)], compute_dtype="float32")["tasks"][str(path)]
    for name in ("acc", "acc_norm"):
        assert theirs[f"{name},none"] == pytest.approx(ours["metrics"][name]["value"])
        assert theirs[f"{name}_stderr,none"] == pytest.approx(ours["metrics"][name]["stderr"])


def test_a_text_longer_than_the_window_is_read_in_windows(model, folder):
    model = lm_eval_model(folder, compute_dtype="float32")
    model._window = 8
    ids = model._tokenizer.encode("def f(x):\n    return x + 1\n\nprint(f(2), 'and more')\n")
    text = model._tokenizer.decode(ids)
    reference = Reference(model._model, model._params, 16)
    expected, whole = 0.0, [BOS, *ids]
    for start in range(1, len(whole), 8):  # the last window has as much context as fits
        stop = min(start + 8, len(whole))
        first = start - 1 if start == 1 or stop == start + 8 else stop - 9
        expected += reference(whole[first:start], whole[start:stop])[0]
    (found,) = model.loglikelihood_rolling([Request(text)])
    assert found == pytest.approx(expected, rel=1e-5)


def test_texts_end_where_they_are_told_to(model):
    (whole,) = model.generate_until([Request("import", {"max_gen_toks": 12})])
    settings = {"until": [whole[4:6]], "max_gen_toks": 12, "do_sample": False}
    (cut,) = model.generate_until([Request("import", settings)])
    assert cut == whole[: whole.index(whole[4:6])]


class Request:
    def __init__(self, *args):
        self.args, self.task_name = args, "local"
