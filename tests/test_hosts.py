"""Several processes as one: the same curve, each with its own share of the data."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from command_line import command, ended, write_inputs
from example_files import CHOICES
from together import end_together, run_together

from gemma_jax.distill.shards import TeacherShards
from gemma_jax.errors import UserError
from gemma_jax.process import join_processes

ROWS, STEPS = 8, 4

STUDENT = """
import dataclasses
from exp import BASE
from gemma_jax.data.tokenizer import TokenizerConfig
from gemma_jax.data.tokens import Corpus
from gemma_jax.distill.objective import Distill
from gemma_jax.experiment import TeacherRun
from gemma_jax.experiment_file import argument
from gemma_jax.sharding import MeshConfig

MESH = MeshConfig(data=argument("data", 2), fsdp=argument("fsdp", 2), tensor=argument("tensor", 2))
corpus = Corpus(
    path="tokens", sources=("good.jsonl",), tokenizer=TokenizerConfig(vocab_size=400),
    valid_fraction=0.1,
)
TEACHER = dataclasses.replace(BASE, name="teacher", data=corpus, mesh=MESH)
shards = TeacherRun(
    path="shards", teacher=TEACHER, draws=16, num_sequences=20, records_per_shard=8, mesh=MESH
)
BASE = dataclasses.replace(
    TEACHER, name="student", seed=1, objective=Distill(shards=shards), mesh=MESH
)
"""


def losses(folder: Path, name: str) -> dict[str, list[float]]:
    lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    names = ("loss", "grad_norm", "valid/loss", "valid/bits_per_byte")
    return {name: [r[name] for r in records if name in r] for name in names}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Data, teacher, shards and student of one process with eight devices."""
    folder = tmp_path_factory.mktemp("alone")
    write_inputs(folder)
    (folder / "student.py").write_text(STUDENT)
    return folder, run_together(folder, ["train", "student.py"], 1)[0][0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "parts"), [((2, 2, 2), 2), ((1, 4, 2), 2), ((1, 1, 8), 1)], ids=str
)
def test_two_processes_are_one(alone, tmp_path, mesh, parts):
    """From text to a student; with `tensor` across processes both need every row."""
    other, whole = alone
    folder = tmp_path / "together"
    folder.mkdir()
    write_inputs(folder)
    (folder / "student.py").write_text(STUDENT)
    sizes = dict(zip(("data", "fsdp", "tensor"), mesh, strict=True))
    arguments = [part for name, x in sizes.items() for part in ("--arg", f"{name}={x}")]
    notes, _ = run_together(folder, ["train", "student.py", *arguments], 2)

    for name in ("teacher", "student"):
        ours, theirs = losses(folder, name), losses(other, name)
        assert len(ours["loss"]) >= 1
        for metric, values in theirs.items():
            np.testing.assert_allclose(ours[metric], values, rtol=1e-5, err_msg=f"{name} {metric}")
    ours, theirs = (TeacherShards.open(path / "shards") for path in (folder, other))
    assert ours.manifest["token_hash"] == theirs.manifest["token_hash"]
    assert [s["records"] for s in ours.manifest["shards"]] == [8, 8, 4]

    share = ROWS // parts
    for kind in ("packed", "shards"):
        for number, read in enumerate(notes):
            first = number * share if parts > 1 else 0
            expected = {tuple(batch[first : first + share]) for batch in whole[kind]}
            # Threads read ahead, here and there by different numbers of batches.
            found = [tuple(batch) for batch in read[kind]]
            assert {len(batch) for batch in found} == {share}, (kind, number)
            assert len(expected.intersection(found)) >= STEPS, (kind, number)


@pytest.mark.slow
def test_finished_models_are_used_by_two_processes(alone):
    """Text, tasks, shards and prompts on a mesh that reaches over both."""
    folder, _ = alone
    (folder / "task.jsonl").write_text("".join(json.dumps(x) + "\n" for x in CHOICES))
    verbs = [
        "eval runs/teacher --data tokens --json",
        "eval runs/teacher --tasks task.jsonl --json",
        "teacher runs/teacher tokens PATH --seq-len 32 --num-sequences 10 --draws 8 --json",
        "generate runs/teacher --prompt abc --prompt de --max-new-tokens 6 --temperature 0 --json",
    ]
    results = []
    for count, mesh in ((1, "data=8,rules=dp"), (2, "fsdp=2,tensor=4")):
        lines = [f"{verb.replace('PATH', f'drawn{count}')} --mesh {mesh}" for verb in verbs]
        _, out = run_together(folder, " then ".join(lines).split(), count)
        results.append([json.loads(line) for line in out.splitlines()])
    (text1, tasks1, shards1, said1), (text2, tasks2, shards2, said2) = results
    assert text2 == pytest.approx(text1, rel=1e-5)
    for name, found in next(iter(tasks1["tasks"].values()))["metrics"].items():
        assert next(iter(tasks2["tasks"].values()))["metrics"][name] == pytest.approx(found)
    assert said1 == said2
    for name in ("teacher_hash", "token_hash", "num_records", "num_tokens"):
        assert shards1[name] == shards2[name]
    for name in ("teacher_entropy", "teacher_cross_entropy"):
        assert shards1[name] == pytest.approx(shards2[name], rel=1e-4)


def test_what_is_refused_to_the_first_is_refused_to_all(tmp_path):
    """The experiment's data are not there: one sentence each, and none waits for another."""
    write_inputs(tmp_path)
    done = end_together(tmp_path, ["train", "exp.py"], 2)
    assert [code for code, _, _ in done] == [2, 2]
    sentences = {line for _, _, err in done for line in err.splitlines() if "error:" in line}
    assert len(sentences) == 1
    assert "tokens" in sentences.pop()


def test_a_process_that_finds_no_others_says_what_it_needs(tmp_path):
    write_inputs(tmp_path)
    done = ended([*command("train", str(tmp_path / "exp.py")), "--num-processes", "2"])
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "give each --coordinator HOST:PORT" in done.stderr


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, ("node0:1", 2, 1, None)),
        ({"JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}, ("node0:1", 2, 1, None)),  # as told
        (
            {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "4"},
            ("node0:1", 2, 1, [0, 1, 2, 3]),
        ),
        (  # a process a GPU, as JAX expects it
            {"SLURM_NTASKS": "8", "SLURM_STEP_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "4"},
            ("node0:1", 2, 1, None),
        ),
    ],
)
def test_what_jax_is_told_of_the_processes(monkeypatch, variables, expected):
    told = []

    def initialize(*arguments):
        told.append(arguments)
        raise ValueError("no network here")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"did not find each other \(no network here\)"):
        join_processes("node0:1", 2, 1)
    assert told == [expected]


def test_processes_are_found_in_the_environment(monkeypatch):
    told = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *x: told.append(x) or 1 / 0)
    monkeypatch.setenv("JAX_NUM_PROCESSES", "4")
    monkeypatch.setenv("JAX_PROCESS_ID", "3")
    with pytest.raises(ZeroDivisionError):
        join_processes()
    assert told == [(None, 4, 3, None)]
    monkeypatch.setenv("JAX_PROCESS_ID", "last")
    with pytest.raises(UserError, match="JAX_PROCESS_ID=last must be a whole number"):
        join_processes()
