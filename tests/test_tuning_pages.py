"""The pages of experiments/tuning: what their scorers say, their data, and the table."""

import json
import re
from pathlib import Path

import jsonschema
import pytest

from gemma_jax import cli
from gemma_jax.experiment_file import load_file, load_function

FOLDER = Path(__file__).parents[1] / "experiments" / "tuning"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A working directory that pages may write into."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def spans(*pairs):
    return json.dumps([{"type": kind, "text": text} for kind, text in pairs])


def test_spans_count_as_often_as_they_are_wanted() -> None:
    score = load_function(f"{FOLDER}/ner_finance.py:score")
    bank, town = ("ORGANIZATION", "Bank"), ("LOCATION", "Reno")
    line = {"completion": spans(bank, bank, town)}
    found = score(line, spans(bank, town, town))
    assert found == {"f1": (4.0, 6.0), "precision": (2.0, 3.0), "recall": (2.0, 3.0)}
    for broken in ("", "[{]", "{}", '[{"type": "LOCATION"}]', "3", '["a"]', "null"):
        assert score(line, broken)["f1"] == (0.0, 3.0)
    assert score({"completion": "[]"}, "[]")["f1"] == (0.0, 0.0)


def test_a_class_is_right_or_not() -> None:
    score = load_function(f"{FOLDER}/trec.py:score")
    line = {"completion": '{"class": "human"}'}
    assert score(line, '{"class":"human"}') == {"accuracy": 1.0}
    assert score(line, '{"class": "entity"}') == score(line, "human") == {"accuracy": 0.0}
    spam = load_function(f"{FOLDER}/sms_spam.py:score")
    ham, bad = '{"label": "ham"}', '{"label": "spam"}'
    assert spam({"completion": bad}, bad) == {"accuracy": 1.0, "f1": (2.0, 2.0)}
    assert spam({"completion": ham}, bad) == {"accuracy": 0.0, "f1": (0.0, 1.0)}
    assert spam({"completion": ham}, ham) == {"accuracy": 1.0, "f1": (0.0, 0.0)}
    assert spam({"completion": bad}, "?") == {"accuracy": 0.0, "f1": (0.0, 1.0)}


def test_what_is_left_in_a_redacted_message_shows() -> None:
    score = load_function(f"{FOLDER}/redaction.py:score")
    name, mail = ("name", "Ann Lee"), ("email", "ann.lee@mail.example")
    line = {"text": "Ann Lee <ann.lee@mail.example>", "completion": spans(name, mail)}
    found = score(line, spans(name, mail))
    assert found["clean"] == found["exact"] == 1
    half = score(line, spans(name))
    assert half["clean"] == half["exact"] == 0
    wrong = score(line, spans(("phone", "Ann Lee"), mail))
    assert (wrong["clean"], wrong["exact"]) == (1, 0)


def test_messages_to_redact_are_the_same_for_a_seed_and_name_what_they_hold(folder) -> None:
    task = load_file(FOLDER / "redaction.py", {"train": 400, "test": 200})["TASK"]
    first = {split: task.file(split).read_bytes() for split in ("train", "valid", "test")}
    load_file(FOLDER / "redaction.py", {"train": 400, "test": 200})
    assert first == {split: task.file(split).read_bytes() for split in first}
    names: dict[str, set[str]] = {}
    ibans = 0
    for split, content in first.items():
        rows = [json.loads(line) for line in content.decode().splitlines()]
        for row in rows:
            found = json.loads(row["completion"])
            jsonschema.validate(found, task.schema)
            place = 0
            for one in found:  # in the order of the message
                place = row["text"].index(one["text"], place) + len(one["text"])
            for one in found:
                if one["type"] == "name":
                    names.setdefault(split, set()).add(one["text"].split()[-1].lower())
                if one["type"] == "iban":
                    ibans += 1
                    code = one["text"].replace(" ", "")
                    assert int("".join(str(int(x, 36)) for x in code[4:] + code[:4])) % 97 == 1
        assert any(row["completion"] == "[]" for row in rows)
    assert ibans > 50
    assert not names["train"] & names["test"]


def test_held_out_conversations_are_decided_by_their_prompt(folder) -> None:
    lines = ["label-coarse,text", *(f"{i % 6},question {i % 300} ?" for i in range(900))]
    (folder / "a.csv").write_text("\n".join(lines))
    task = load_file(FOLDER / "trec.py", {"csv": "a.csv", "test": 20})["TASK"]
    rows = {
        split: [json.loads(line)["prompt"] for line in task.file(split).read_text().splitlines()]
        for split in ("train", "valid", "test")
    }
    assert len(rows["test"]) == 20
    assert 200 < len(rows["train"]) < 280
    everything = [prompt for prompts in rows.values() for prompt in prompts]
    assert len(set(everything)) == len(everything)


def row(name, value, dtype, **more):
    metrics = {key: {"value": value, "stderr": 0.01} for key in ("f1", "json", "valid")}
    found = {"metrics": metrics, "examples": 50}
    base = {"variant": name, "seed": 0, "label": name, "folder": f"runs/x/{name}"}
    return {**base, "bound": found, "free": found, "dtype": dtype, **more}


def test_the_winner_is_the_smallest_that_is_as_good(folder) -> None:
    write = load_function(f"{FOLDER}/comparison_table.py:write")
    rows = [row("full", 0.9, "bf16"), row("qat", 0.885, "q4_0", minutes=1.5)]
    rows += [row("lora", 0.8, "bf16"), row("base", 0.4, "q4_0")]
    text = write(rows, folder / "x", "f1", folder / "schema.json")
    assert "qat is the smallest" in text
    assert "./launch.sh export runs/x/qat x.gguf --format gguf --dtype q4_0" in text
    table = (folder / "x" / "comparison.md").read_text()
    assert re.search(r"\| qat \| 0\.885 ± 0\.010 \|.* \| 1\.5 \|", table)
    assert (folder / "x" / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert len(json.loads((folder / "x" / "comparison.json").read_text())["rows"]) == 4


def test_sizes_and_speeds_of_files_come_later(folder) -> None:
    """A row without a file of its own takes the figures of its type."""
    rows = [row("base", 0.4, "bf16"), row("lora", 0.9, "bf16"), row("qat", 0.9, "q4_0")]
    with_files = load_function(f"{FOLDER}/comparison_table.py:with_files")
    assert with_files(rows, folder / "gguf") == rows
    (folder / "gguf").mkdir()
    (folder / "gguf" / "base.gguf").write_bytes(b"12345")
    speed = json.dumps({"tokens_per_s": 7.0, "bytes": 3})
    (folder / "gguf" / "qat.speed.json").write_text(speed)  # the file itself may be gone
    base, lora, qat = with_files(rows, folder / "gguf")
    assert base["bytes"] == lora["bytes"] == 5
    assert "llama_cpp" not in lora
    assert (qat["bytes"], qat["llama_cpp"]) == (3, 7.0)


PAGE = """
from gemma_jax.experiment import Experiment
from gemma_jax.model.config import tiny
from gemma_jax.sweep import points

BASE = Experiment(name="x", model=tiny(), data="d", tokens=64, batch_tokens=64, seq_len=64)
SWEEP = points(BASE, one={})
AFTER = lambda sweep: f"{sweep.base.name} with seeds {sweep.seeds} is done"
"""


def test_a_sweep_ends_with_what_its_file_says(folder, monkeypatch, capsys) -> None:
    (folder / "page.py").write_text(PAGE)
    ran = []
    monkeypatch.setattr("gemma_jax.sweep.run_sweep", lambda sweep, only=(): ran.append(only) or [])
    cli.main(["sweep", "page.py", "--seeds", "3"])
    assert capsys.readouterr().out.endswith("x with seeds (3,) is done\n")
    cli.main(["sweep", "page.py", "--only", "one"])  # one of several jobs: not all is finished
    assert "done" not in capsys.readouterr().out
    assert ran == [(), ["one"]]
    (folder / "page.py").write_text(PAGE + "AFTER = 'table'\n")
    with pytest.raises(SystemExit):
        cli.main(["sweep", "page.py"])
    assert "AFTER of page.py must be a function" in capsys.readouterr().err
