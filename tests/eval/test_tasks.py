"""Tasks against log-probabilities of the plain forward pass, counted by hand."""

import json
import math
import re
import statistics

import jax
import jax.numpy as jnp
import pytest
from example_files import CHOICES, PAIRS, ready, write
from reference import Reference

from gemma_jax import cli
from gemma_jax.data.tokenizer import BOS
from gemma_jax.errors import UserError
from gemma_jax.eval.answers import matches, write_answers
from gemma_jax.eval.examples import Example, read_task
from gemma_jax.eval.likelihood import Likelihood
from gemma_jax.eval.tasks import encode_pair, example_scores, limited, means, run_task
from gemma_jax.generation.decode import Generator
from gemma_jax.runs import load_model
from gemma_jax.trained import evaluate, evaluate_tasks

PARTIAL = [
    {"context_options": ["Ann was so Ann", "Ann was so Bo"], "continuation": "left.", "gold": 1},
    {"context_options": ["A", "The other one"], "continuation": "is here", "gold": 0},
]
CLOZE = [
    {"context": "In my palm is a clear", "continuation": "stone"},
    {"context": "", "continuation": "Nothing came before"},
    {"context": 'She said "no" and', "continuation": "left"},
]


@pytest.fixture(scope="module")
def loaded(folder):
    return load_model(folder)


@pytest.fixture(scope="module")
def reference(loaded):
    return Reference(loaded.model, loaded.params, 128)


def scores(loaded, path, **options):
    return run_task(loaded.model, loaded.params, loaded.tokenizer, read_task(path), **options)


def nats(loaded, reference, context, continuation):
    """(log-probability, greedy, tokens); whitespace at the end of a context is the continuation's,
    and BOS comes first."""
    spaces = context[len(context.rstrip()) :]
    before = loaded.tokenizer.encode(context.rstrip())
    after = loaded.tokenizer.encode(context.rstrip() + spaces + continuation)[len(before) :]
    return *reference([BOS, *before], after), len(after)


def best(values):
    return max(range(len(values)), key=values.__getitem__)


def check(metrics, name, hits):
    """A metric is the mean of `hits` with sqrt(p (1 - p) / (n - 1)) as its standard error."""
    p, n = sum(hits) / len(hits), len(hits)
    assert metrics[name]["value"] == pytest.approx(p)
    assert metrics[name]["stderr"] == pytest.approx(math.sqrt(p * (1 - p) / (n - 1)))


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.xz"])
def test_choices(loaded, reference, tmp_path, suffix):
    found = scores(loaded, write(tmp_path / f"choices{suffix}", CHOICES))
    acc, norm, token = [], [], []
    for line in CHOICES:
        space = "" if line["query"].endswith("\n") else " "
        each = [nats(loaded, reference, line["query"], space + one) for one in line["choices"]]
        acc.append(best([one[0] for one in each]) == line["gold"])
        lengths = [len(one) for one in line["choices"]]
        norm.append(best([e[0] / n for e, n in zip(each, lengths, strict=True)]) == line["gold"])
        token.append(best([one[0] / one[2] for one in each]) == line["gold"])
    assert (found["kind"], found["examples"], found["shots"]) == ("choice", 3, 0)
    check(found["metrics"], "acc", acc)
    check(found["metrics"], "acc_norm", norm)
    check(found["metrics"], "acc_per_token", token)


def test_one_continuation_after_several_contexts(loaded, reference, tmp_path):
    found = scores(loaded, write(tmp_path / "partial.jsonl", PARTIAL))
    hits = []
    for line in PARTIAL:
        after = " " + line["continuation"]
        each = [nats(loaded, reference, one, after)[0] for one in line["context_options"]]
        hits.append(best(each) == line["gold"])
    assert found["kind"] == "partial"
    check(found["metrics"], "acc", hits)
    assert list(found["metrics"]) == ["acc"]


def test_cloze(loaded, reference, tmp_path):
    found = scores(loaded, write(tmp_path / "cloze.jsonl", CLOZE))["metrics"]
    texts = [(c["context"], (" " if c["context"] else "") + c["continuation"]) for c in CLOZE]
    each = [nats(loaded, reference, *pair) for pair in texts]
    check(found, "acc", [one[1] for one in each])
    loss = [-one[0] for one in each]
    assert found["perplexity"]["value"] == pytest.approx(math.exp(statistics.mean(loss)), rel=1e-4)
    error = statistics.stdev(loss) / math.sqrt(3)
    expected = found["perplexity"]["value"] * error
    assert found["perplexity"]["stderr"] == pytest.approx(expected, rel=1e-3)
    size = sum(len(text.encode()) for _, text in texts)
    assert found["bits_per_byte"]["value"] == pytest.approx(sum(loss) / size / math.log(2))
    assert found["bits_per_byte"]["stderr"] > 0


def test_minimal_pairs_by_group(loaded, reference, tmp_path):
    found = scores(loaded, write(tmp_path / "pairs.jsonl.xz", PAIRS))
    hits = [
        nats(loaded, reference, "", line["good"])[0] > nats(loaded, reference, "", line["bad"])[0]
        for line in PAIRS
    ]
    check(found["metrics"], "acc", hits)
    groups = found["groups"]
    assert set(groups) == {"uid:agreement", "uid:order", "field:morphology", "field:syntax"}
    check(groups["uid:agreement"], "acc", hits[:2])
    assert groups["field:syntax"]["acc"] == {"value": float(hits[2]), "stderr": None}


def test_open_answers(loaded, reference, tmp_path):
    """Greedy by the plain forward pass, up to the stop."""
    prompts = ["Question: who?\nAnswer:", "import"]
    texts = []
    for prompt in prompts:
        ids = [BOS, *loaded.tokenizer.encode(prompt)]
        for _ in range(12):
            ids.append(int(reference.all(ids)[-1].argmax()))
        texts.append(loaded.tokenizer.decode(ids[-12:]))
    generator = Generator(loaded.model, loaded.params)
    stop = [texts[0][3:5], "\0"]
    options = {"max_new_tokens": 12, "stop": stop}
    found = write_answers(generator, loaded.tokenizer, prompts, **options)
    assert found[0] == texts[0][: texts[0].index(stop[0])]
    assert found[1] == texts[1].partition(stop[0])[0]
    lines = [
        {"question": prompts[0], "answers": ["nothing of the kind"]},
        {"question": prompts[1], "answers": ["x", "y"]},
    ]
    result = scores(loaded, write(tmp_path / "answers.jsonl", lines))
    assert (result["kind"], result["primary"]) == ("answer", "em")
    assert result["metrics"]["em"]["value"] == 0.0


def test_answers_are_compared_as_texts():
    assert matches(" The  Sunset Boulevard.", ["x", "sunset boulevard"])
    assert not matches("Sunset", ["Sunset Boulevard"])


def test_ready_requests(loaded, reference, tmp_path):
    """With the likelihood of a choice without its question."""
    lines = [
        *(ready(7, i, "Sky?\nAnswer:", text, 1) for i, text in enumerate([" blue", " red one"])),
        *(ready(9, i, "Sea?\nAnswer:", text, 0) for i, text in enumerate([" wet", " a b c"])),
        *(ready(1000007, i, "Answer:", t, 1) for i, t in enumerate([" blue", " red one"])),
        *(ready(1000009, i, "Answer:", t, 0) for i, t in enumerate([" wet", " a b c"])),
    ]
    found = scores(loaded, write(tmp_path / "requests.jsonl.gz", lines))
    hits = []
    for question, choices, gold in (
        ("Sky?\nAnswer:", [" blue", " red one"], 1),
        ("Sea?\nAnswer:", [" wet", " a b c"], 0),
    ):
        gains = [
            nats(loaded, reference, question, one)[0] - nats(loaded, reference, "Answer:", one)[0]
            for one in choices
        ]
        hits.append(best(gains) == gold)
    check(found["metrics"], "acc_uncond", hits)
    assert found["examples"] == 2


def test_a_limit_takes_of_every_group(tmp_path):
    task = read_task(write(tmp_path / "pairs.jsonl", PAIRS))
    assert [one.groups[0] for one in limited(task, 2)] == ["uid:agreement", "uid:order"]
    assert limited(task, 5) == limited(task, None) == task.examples


def test_a_context_that_is_too_long_is_cut_at_its_start(loaded, reference, tmp_path):
    line = {"context": "word " * 200 + "end", "continuation": "now"}
    found = scores(loaded, write(tmp_path / "long.jsonl", [line]))
    after = len(encode_pair(loaded.tokenizer, "end", " now")[1])
    ids = loaded.tokenizer.encode(line["context"])[-(128 - after - 1) :]
    whole = loaded.tokenizer.encode(line["context"] + " now")[-after:]
    loss = -reference([BOS, *ids], whole)[0]
    assert found["cut"] == 1
    assert found["metrics"]["perplexity"]["value"] == pytest.approx(math.exp(loss), rel=1e-4)
    line = {"context": "a", "continuation": "word " * 200}
    with pytest.raises(UserError, match="leaves no room in the model's context of 128"):
        scores(loaded, write(tmp_path / "longer.jsonl", [line]))


def test_each_norm_may_choose_another():
    """Letters without the joining space, tokens, and what a choice is worth by itself."""
    pairs = tuple(("q", text) for text in (" a", "abcd", " abcdefgh", "xyz"))
    found = [Likelihood(logprob, False) for logprob in (-1.0, -3.0, -5.0, -6.0)]
    alone = [Likelihood(logprob, False) for logprob in (-1.0, -3.0, -6.0, -9.0)]
    # by letter -1, -0.75, -0.625, -2; by token -1, -0.75, -2.5, -3; beyond itself 0, 0, 1, 3
    chosen = {"acc": 0, "acc_norm": 2, "acc_per_token": 1, "acc_uncond": 3}
    for metric, gold in chosen.items():
        scores = example_scores("choice", Example(pairs, gold), found, [1, 4, 2, 2], alone)
        assert scores == {name: float(name == metric) for name in chosen}


def test_a_model_without_numbers_is_refused(loaded, tmp_path):
    task = read_task(write(tmp_path / "cloze.jsonl", CLOZE))
    params = jax.tree.map(lambda x: x * jnp.nan, loaded.params)
    with pytest.raises(UserError, match="log-likelihoods that are no numbers"):
        run_task(loaded.model, params, loaded.tokenizer, task)


def test_progress_ends_at_the_number_of_examples(loaded, tmp_path):
    for lines in (PARTIAL, PAIRS, CHOICES):
        done = []
        scores(loaded, write(tmp_path / "lines.jsonl", lines), advance=done.append)
        assert sum(done) == len(lines)


def test_a_mean_of_one_has_no_error():
    assert means([{"acc": 1.0}]) == {"acc": {"value": 1.0, "stderr": None}}


def test_tokens_are_cut_where_the_context_ends(loaded):
    for context, continuation in (("a b ", "c"), ("a b", " c"), ("", "c"), ("x\n", "y")):
        before, after = encode_pair(loaded.tokenizer, context, continuation)
        assert before[0] == BOS
        whole = loaded.tokenizer.encode(context + continuation)
        assert [*before[1:], *after] == whole
        assert after


def test_the_command(folder, tmp_path, capsys):
    """Two files, a limit, JSON on stdout and in a file, and a table."""
    choices = write(tmp_path / "choices.jsonl", CHOICES)
    pairs = write(tmp_path / "pairs.jsonl", PAIRS)
    output = tmp_path / "scores.json"
    line = ["eval", str(folder), "--tasks", f"{choices},{pairs}", "--limit", "2"]
    cli.main([*line, "--json", "--output", str(output)])
    found = json.loads(capsys.readouterr().out)
    assert json.loads(output.read_text()) == found
    assert list(found["tasks"]) == [str(choices), str(pairs)]
    assert found["tasks"][str(pairs)]["examples"] == 2
    cli.main(line)
    table = capsys.readouterr().out
    assert "acc_norm" in table
    assert "±" in table
    same = evaluate_tasks(folder, [str(choices), str(pairs)], limit=2, batch_tokens=64)
    assert same["tasks"][str(choices)]["metrics"] == found["tasks"][str(choices)]["metrics"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "hellaswg"], "no task 'hellaswg'.*hellaswag, boolq, piqa"),
        (["--tasks", ","], "give at least one task"),
        (
            ["--source", "x", "--output", "y"],
            "--output is for tasks and conversations; give --tasks too",
        ),
        (["--tasks", "no/such.jsonl"], "no/such.jsonl does not exist"),
        (["--tasks", "piqa", "--source", "x"], "one of text .*, tasks .* and --conversations"),
    ],
)
def test_bad_commands_are_refused(folder, options, message, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["eval", str(folder), *options])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error)


def test_text_is_scored_on_a_model_that_knows_no_sequence_length(folder, tmp_path):
    """An imported model has no experiment.json."""
    lines = [{"text": f"some text number {i} to score"} for i in range(20)]
    path = write(tmp_path / "text.jsonl", lines)
    assert evaluate(folder, sources=(str(path),))["bits_per_byte"] > 0
