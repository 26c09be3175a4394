"""From text to a student that was taught, in one folder; and the contracts of experiment files."""

import dataclasses
import json
import math
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_jax import claims, experiment, runs
from gemma_jax.data.mixture import open_tokens
from gemma_jax.data.packing import packed_sequences
from gemma_jax.data.tokenizer import TokenizerConfig
from gemma_jax.data.tokens import Corpus
from gemma_jax.distill.objective import Distill
from gemma_jax.errors import Interrupted, Preempted, UserError
from gemma_jax.eval.perplexity import make_evaluation
from gemma_jax.experiment import Experiment, TeacherRun, prepare_shards, run
from gemma_jax.experiment_file import load_file
from gemma_jax.files import locked
from gemma_jax.model.config import tiny
from gemma_jax.model.transformer import Transformer
from gemma_jax.outline import build_objective
from gemma_jax.settings import override, to_json
from gemma_jax.sharding import MeshConfig, make_layout
from gemma_jax.sweep import Sweep
from gemma_jax.training.loop import LoopConfig
from gemma_jax.training.objective import Xent
from gemma_jax.training.step import init_state, make_step, state_shardings
from gemma_jax.training.weights import weights_hash
from gemma_jax.tuning.sft import Sft

VOCAB = 400
# Others beside them are what they share.
FILES = sorted(
    path
    for path in (Path(__file__).parents[1] / "experiments").rglob("*.py")
    if re.search(r"^(BASE|SWEEP)\b", path.read_text(), re.MULTILINE)
)


def text(lines=400):
    rng = np.random.default_rng(0)
    words = ["alpha", "beta", "gamma", "delta", "über", "omega", "sum", "of", "the", "parts"]
    return "\n".join(" ".join(rng.choice(words, 12)) for _ in range(lines))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a corpus, which is the working directory of this file's tests."""
    path = tmp_path_factory.mktemp("work")
    for number in range(20):
        (path / f"part{number:02}.txt").write_text(f"{number} " + text(20 + number))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        yield path


@pytest.fixture(scope="module")
def base(folder):
    corpus = Corpus(
        path="data",
        sources=("part*.txt",),
        tokenizer=TokenizerConfig(vocab_size=VOCAB),
        valid_fraction=0.1,
    )
    model = dataclasses.replace(tiny(), vocab_size=VOCAB, num_layers=2, attn_pattern="LG")
    return Experiment(
        name="base",
        model=model,
        data=corpus,
        tokens=8 * 256,
        batch_tokens=256,
        seq_len=32,
        valid_tokens=512,
        train=LoopConfig(log_every=2, eval_every=4, checkpoint_every=4),
    )


@pytest.fixture(scope="module")
def result(base):
    return run(base)


def shards_of(teacher, **settings):
    return Distill(
        shards=TeacherRun(path="shards", teacher=teacher, draws=8, num_sequences=16, **settings)
    )


def test_a_run_leaves_its_result_and_returns_it_again(base, result):
    assert math.isfinite(result["bits_per_byte"])
    assert result["steps"] == 8
    before = (base.folder / "experiment.json").read_text()
    assert run(base) == json.loads(json.dumps(result))
    watched = dataclasses.replace(base, train=LoopConfig(log_every=1))
    assert run(watched)["bits_per_byte"] == result["bits_per_byte"]
    assert (base.folder / "experiment.json").read_text() == before


def test_another_experiment_in_the_folder_is_refused(base, result):
    with pytest.raises(UserError, match=r"run with optimizer\.learning_rate=0\.001"):
        run(override(base, {"optimizer.learning_rate": 2e-3}))
    with pytest.raises(UserError, match=r"train\.ema_decay=None, and this one has 0\.9"):
        run(override(base, {"train.ema_decay": 0.9}))


def test_a_student_is_taught_by_an_experiment(base, result):
    student = dataclasses.replace(base, name="student", objective=shards_of(base))
    taught = run(student)
    assert {"kl", "agreement", "teacher_cross_entropy"} <= taught["metrics"].keys()
    # How the teacher is watched is nobody's business, what it computes is.
    watched = override(student, {"objective.shards.teacher.train.log_every": 5})
    assert run(watched)["loss"] == taught["loss"]
    with pytest.raises(UserError, match=r"objective\.shards\.teacher\.seed=0"):
        run(override(student, {"objective.shards.teacher.seed": 1}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq_len": 16}, "seq_len=16, but the teacher's shards have 32"),
        ({"model.vocab_size": 300}, r"model\.vocab_size=300, but the teacher's shards have 400"),
    ],
)
def test_what_does_not_fit_a_teacher_is_refused_before_it_is_trained(base, changes, message):
    teacher = dataclasses.replace(base, name="untrained")
    student = dataclasses.replace(base, name="refused", objective=shards_of(teacher))
    with pytest.raises(UserError, match=message):
        run(override(student, changes))
    assert not teacher.folder.exists()
    assert not student.folder.exists()  # so that the mended experiment may have it


def test_a_folder_that_another_process_trains_in_is_refused(base, result):
    other = dataclasses.replace(base, name="held")
    with (
        locked(other.folder, name=claims.LOCK),
        pytest.raises(UserError, match=rf"runs/held is being trained by process {os.getpid()};"),
    ):
        run(other)
    with locked(base.folder, name=claims.LOCK):
        assert run(base)["loss"] == result["loss"]  # a finished run needs nothing


def test_a_refused_run_keeps_no_folder(base, monkeypatch):
    """So that the mended experiment may have it; what was saved is kept."""

    def refuse(job):
        (job.folder / "tensorboard").mkdir()
        raise UserError("a record is damaged.")

    monkeypatch.setattr(experiment, "train", refuse)
    with pytest.raises(UserError, match="is damaged"):
        run(dataclasses.replace(base, name="refused"))
    assert not Path("runs/refused").exists()


def test_a_token_set_may_lie_in_the_folder_of_its_run(base, monkeypatch):
    def refuse(job):
        raise UserError("a record is damaged.")

    monkeypatch.setattr(experiment, "train", refuse)
    corpus = dataclasses.replace(base.data, path="runs/both")
    with pytest.raises(UserError, match="is damaged"):
        run(dataclasses.replace(base, name="both", data=corpus))
    assert open_tokens(corpus).tokenizer.vocab_size == VOCAB


def test_the_seconds_of_all_starts_are_counted(tmp_path, monkeypatch):
    clock = iter([0.0, 100.0, 1000.0, 1005.0])
    monkeypatch.setattr(claims.time, "time", lambda: next(clock))
    claims.claim(tmp_path, {"name": "x"})
    with pytest.raises(Interrupted), claims.held(tmp_path):
        raise Interrupted
    with claims.held(tmp_path) as seconds:
        assert seconds() == 105.0
        runs.write_result(tmp_path, {})


@pytest.mark.parametrize("begun", [False, True])
def test_a_run_that_has_begun_keeps_its_settings_when_it_is_refused(tmp_path, begun):
    """Its checkpoints may be on a disk that is away; one that has not lets go of the folder."""
    claims.claim(tmp_path, {"name": "x"})
    if begun:
        (tmp_path / "metrics.jsonl").write_text('{"step": 2}\n')
    with pytest.raises(UserError, match="away"), claims.held(tmp_path):
        raise UserError("it is away.")
    assert (tmp_path / "experiment.json").exists() == begun


def test_a_full_disk_is_told_by_what_met_it_first(tmp_path, monkeypatch):
    claims.claim(tmp_path, {"name": "x"})

    def refuse(path, value):
        raise UserError("another sentence")

    monkeypatch.setattr(claims, "write_json", refuse)
    with pytest.raises(Preempted, match="saved"), claims.held(tmp_path):
        raise Preempted("saved")


def test_finished_shards_need_their_teacher_no_more(base, result):
    student = dataclasses.replace(base, name="late", objective=shards_of(base))
    prepare_shards(student.objective.shards)
    aside = base.folder.rename("runs/aside")
    try:
        assert "kl" in run(student)["metrics"]
        by_name = shards_of(str(base.folder), data=base.data, seq_len=base.seq_len)
        with pytest.raises(UserError, match="targets of a teacher with teacher="):
            run(dataclasses.replace(student, name="other", objective=by_name))
        assert not base.folder.exists()
    finally:
        aside.rename(base.folder)


@pytest.mark.parametrize(
    ("seed", "changes", "message"),
    [
        (0, {"draws": 9}, "draws = 8, not 9"),
        (0, {"num_sequences": 17}, "num_records = 16, not 17"),
        (1, {}, r"teacher\.seed=0, and this one has 1"),
        (0, {"path": "shards2", "num_sequences": 10**6}, "num_sequences=1000000 is over the"),
        (
            0,
            {"path": "shards2", "data": "data2"},
            "another tokenizer .* than the data of the student",
        ),
    ],
)
def test_a_lesson_that_cannot_be_is_refused_before_its_teacher_is_trained(
    base, result, seed, changes, message
):
    prepare_shards(shards_of(base).shards)
    other = {"path": "data2", "sources": ("part00.txt", "part19.txt")}
    open_tokens(dataclasses.replace(base.data, **other))
    teacher = dataclasses.replace(base, name="untrained", seed=seed)
    shards = dataclasses.replace(shards_of(teacher).shards, **changes)
    student = dataclasses.replace(base, name="refused", objective=Distill(shards=shards))
    with pytest.raises(UserError, match=message):
        run(student)
    assert not teacher.folder.exists()


def test_bits_per_byte_by_hand(base, result):
    loaded = runs.load_model(base.folder)
    tokens = open_tokens(base.data)
    sequences = []
    for sequence in packed_sequences(tokens, "valid", base.seq_len, seed=0):
        sequences.append(sequence)
        if len(sequences) == base.valid_tokens // base.seq_len:
            break
    batch = {name: np.stack([x[name] for x in sequences]) for name in sequences[0]}
    hidden = jax.jit(loaded.model.hidden)(
        loaded.params, batch["tokens"], batch["positions"], batch["segment_ids"]
    )
    logits = (
        np.asarray(hidden, np.float64)
        @ np.asarray(loaded.model.output_embedding(loaded.params), np.float64).T
    )
    nats = (
        np.log(np.exp(logits).sum(-1))
        - np.take_along_axis(logits, batch["labels"][..., None], axis=-1)[..., 0]
    )
    sizes = tokens.tokenizer.token_bytes()[batch["labels"]] * (batch["loss_mask"] > 0)
    bits = nats[sizes > 0].sum() / math.log(2) / sizes.sum()
    assert result["bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    labels = batch["loss_mask"] > 0
    assert result["loss"] == pytest.approx(nats[labels].mean(), rel=1e-5)
    # The filled-up last batch changes nothing.
    again = make_evaluation(
        loaded.model,
        sequences,
        tokens.tokenizer.token_bytes(),
        make_layout(MeshConfig(), jax.devices()[:1]),
        batch_size=7,
    )(loaded.params)
    assert again["bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    assert again["bytes"] == sizes.sum()


def test_a_checkpoint_is_a_model_too(base, result):
    last = runs.load_model(base.folder)
    same = runs.load_model(base.folder / "checkpoints" / "8")
    jax.tree.map(np.testing.assert_array_equal, last.params, same.params)
    assert weights_hash(last.params) == weights_hash(same.params)
    assert runs.trained_seq_len(base.folder / "checkpoints" / "8") == 32
    with pytest.raises(UserError, match=r"has no model\.json"):
        runs.load_model("data")


def test_a_later_start_with_another_commit_is_noted(folder, monkeypatch):
    path, settings = Path("claimed"), {"name": "x"}
    claims.claim(path, settings)
    first = json.loads((path / "experiment.json").read_text())
    claims.claim(path, settings)
    assert json.loads((path / "experiment.json").read_text()) == first
    monkeypatch.setattr(claims, "commit", lambda: "another")
    claims.claim(path, settings)
    claims.claim(path, settings)
    saved = json.loads((path / "experiment.json").read_text())
    assert [start["commit"] for start in saved.pop("resumed_with")] == ["another"]
    assert saved == first
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    claims.claim(Path("second_host"), settings)
    assert not Path("second_host").exists()


def test_an_experiment_file_may_import_its_neighbours(tmp_path, base):
    """As a script may; also one that lies in another folder than the one that is worked in."""
    (tmp_path / "neighbour_of_it.py").write_text("from gemma_jax.model.config import tiny as MODEL")
    (tmp_path / "it.py").write_text(
        "from neighbour_of_it import MODEL\nfrom gemma_jax.experiment import Experiment\n"
        "BASE = Experiment(name='x', model=MODEL(), data='d', tokens=8, batch_tokens=8, seq_len=8)"
    )
    before = list(sys.path)
    assert load_file(tmp_path / "it.py")["BASE"].model == tiny()
    assert sys.path == before
    (tmp_path / "broken_neighbour.py").write_text("x = 1\ny = z\n")
    (tmp_path / "it.py").write_text("import broken_neighbour")
    with pytest.raises(UserError, match=r"broken_neighbour\.py line 2: NameError"):
        load_file(tmp_path / "it.py")


@pytest.mark.parametrize("dtype", ["compute", "float8_e4m3fn"])
@pytest.mark.parametrize("objective", [Xent(), Distill(shards="shards"), Sft()])
def test_the_logits_dtype_reaches_every_objective(objective, dtype):
    model = dataclasses.replace(tiny(), head_logits_dtype=dtype)
    build = build_objective(SimpleNamespace(model=model, objective=objective), None)
    ids, numbers = (jnp.zeros((2, 8), kind) for kind in (jnp.int32, jnp.float32))
    batch = dict.fromkeys(("tokens", "labels", "segment_ids", "positions"), ids)
    batch |= dict.fromkeys(("loss_mask", "teacher_label_logprob", "teacher_entropy"), numbers)
    batch |= {"target_ids": ids[..., None], "target_weights": numbers[..., None]}
    params = Transformer(model).shapes()
    program = str(jax.make_jaxpr(build)(params, batch, jax.random.key(0)))
    assert ("f8_e4m3fn" in program) == (dtype != "compute")


def points_of(path):
    defined = load_file(path)
    sweep = defined.get("SWEEP")
    if isinstance(sweep, Sweep):
        for point in sweep.points:
            yield sweep.experiment(point, 0)
    else:
        yield defined["BASE"]


SHAPED: set = set()  # what differs in other things alone has been tried


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_experiment_file_fits_eight_devices(path, folder):
    """Shapes of one step of every point, laid out by the sharding rules; nothing is allocated."""
    for one in points_of(path):
        to_json(one)
        objective = type(one.objective), one.model.final_softcap
        shaped = (one.model, type(one.optimizer), objective, one.batch_size, one.seq_len)
        if shaped in SHAPED:
            continue
        SHAPED.add(shaped)
        layout = make_layout(MeshConfig(data=2, fsdp=2, tensor=2))
        model = Transformer(one.model)
        optimizer = one.optimizer.build(model.axes(), one.num_steps or 100)
        shape = (one.batch_size, one.seq_len)
        batch = {
            name: jax.ShapeDtypeStruct(shape, jnp.int32)
            for name in ("tokens", "labels", "segment_ids", "positions")
        }
        floats = ["loss_mask"]
        if isinstance(one.objective, Distill):
            floats += ["teacher_label_logprob", "teacher_entropy"]
            batch["target_ids"] = jax.ShapeDtypeStruct((*shape, 4), jnp.int32)
            batch["target_weights"] = jax.ShapeDtypeStruct((*shape, 4), jnp.float32)
        batch |= {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name in floats}
        ema = one.train.ema_decay
        step = make_step(
            one.objective.build(model, softcap=one.model.final_softcap),
            optimizer,
            microbatches=one.train.microbatches,
            ema_decay=ema,
        )
        state = jax.eval_shape(
            lambda m=model, o=optimizer, e=ema: init_state(
                m.init(jax.random.key(0)), o, ema=e is not None
            )
        )
        with layout.active():
            shardings = state_shardings(layout, model.axes(), state)
            after, metrics = jax.eval_shape(step, state, batch)
        assert jax.tree.structure(after) == jax.tree.structure(state)
        assert jax.tree.structure(shardings) == jax.tree.structure(state)
        assert {"loss", "grad_norm"} <= metrics.keys()
