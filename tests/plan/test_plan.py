"""Plans of tiny models, for eight CPU devices that stand in for chips."""

import contextlib
import dataclasses
import json

import jax
import numpy as np
import pytest
from command_line import EXPERIMENT
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from gemma_jax import cli, files
from gemma_jax.distill.objective import Distill
from gemma_jax.errors import INTERRUPTED_CODE, PREEMPTED_CODE, Terminated, UserError
from gemma_jax.experiment import Experiment, TeacherRun
from gemma_jax.model.config import tiny
from gemma_jax.plan import compiling, run, search, table
from gemma_jax.plan.chips import CHIPS, Hardware, parse_device, parse_topology
from gemma_jax.plan.estimate import abstract_layout, estimate_memory
from gemma_jax.plan.memory import memory_of, part_bytes
from gemma_jax.plan.programs import Task, parts_of, trace
from gemma_jax.sharding import MeshConfig, make_layout
from gemma_jax.training.loop import LoopConfig
from gemma_jax.tuning.lora import Lora, QLora
from gemma_jax.tuning.qat import Qat

ROWS, SEQ_LEN = 16, 32
MESH = MeshConfig(data=2, fsdp=2, tensor=2)
BASE = Experiment(
    name="planned",
    model=tiny(),
    data="there/is/none",
    tokens=100 * ROWS * SEQ_LEN,
    batch_tokens=ROWS * SEQ_LEN,
    seq_len=SEQ_LEN,
    mesh=MESH,
    train=LoopConfig(microbatches=2),
)
TAUGHT = dataclasses.replace(
    BASE,
    objective=Distill(
        shards=TeacherRun(path="none", teacher=BASE, draws=6, batch_size=8, mesh=MESH)
    ),
)
# One block in a loop, where a test compiles several programs that no cache holds.
ALIKE = dataclasses.replace(BASE, model=dataclasses.replace(tiny(), attn_pattern="G"))
EIGHT = Hardware(CHIPS["v5e"], (2, 4))


@pytest.fixture(scope="module")
def plans(tmp_path_factory):
    return tmp_path_factory.mktemp("plans")


@pytest.fixture
def here(monkeypatch, tmp_path, plans):
    """CPU devices in place of chips, and a cache that these tests share. JAX's own is left on:
    these devices can load what it holds."""
    monkeypatch.setattr(run, "devices_of", lambda hardware: jax.devices())
    monkeypatch.setattr(run, "no_cache", contextlib.nullcontext)
    monkeypatch.setattr(files, "compilation_cache", lambda: plans / "jax" / "cpu")
    return tmp_path


@pytest.mark.parametrize(
    "task",
    [
        Task("train", BASE),
        Task("train", TAUGHT),
        Task(
            "train", dataclasses.replace(BASE, quantization=Qat(), train=LoopConfig(ema_decay=0.9))
        ),
        Task("train", dataclasses.replace(BASE, init="no/run", adapter=Lora(rank=2))),
        Task("train", dataclasses.replace(BASE, init="no/run", adapter=QLora(rank=2))),
        Task("teacher", TAUGHT),
        Task("teacher", BASE),
        Task("decode", BASE, rows=4),
    ],
    ids=["train", "distill", "qat", "lora", "qlora", "teacher", "own_teacher", "decode"],
)
def test_memory_is_what_xla_reports(task):
    layout = make_layout(MESH)
    traced = trace(task, layout)
    with layout.active():
        compiled = traced.program.lower().compile()
    found, memory = compiled.memory_analysis(), memory_of(compiled, traced.parts)
    assert memory.arguments == found.argument_size_in_bytes
    assert memory.total == found.total_allocation_bytes + found.generated_code_size_in_bytes
    # Every argument has its line, but for the counter of steps, a limit of them, record numbers.
    assert 0 <= memory.padding <= 4 * ROWS
    assert memory.parts["parameters"] > 0


@pytest.mark.parametrize(
    "mesh",
    [
        MeshConfig(data=8, rules="dp"),
        MeshConfig(data=1, fsdp=8, rules="fsdp"),
        MeshConfig(data=1, fsdp=2, tensor=4),  # heads, but not the one kv head, divide by 4
    ],
    ids=["dp", "fsdp", "1x2x4"],
)
def test_parts_are_what_a_device_holds(mesh):
    """The same arrays, put onto the devices."""
    task = Task("train", dataclasses.replace(TAUGHT, mesh=mesh, train=LoopConfig(ema_decay=0.9)))
    parts = parts_of(task, make_layout(mesh))

    def held(like):
        array = jax.device_put(np.zeros(like.shape, like.dtype), like.sharding)
        return array.addressable_shards[-1].data.nbytes

    on_one = {name: sum(map(held, jax.tree.leaves(tree))) for name, tree in parts.items()}
    assert part_bytes(parts) == on_one
    assert on_one["optimizer"] >= 2 * on_one["parameters"]
    assert on_one["average"] == on_one["parameters"]


def test_a_plan_says_what_a_step_takes(here):
    found = run.plan(Task("train", BASE), EIGHT)
    assert found["memory"]["fits"]
    assert found["chips"] == 8
    assert found["tokens_per_step"] == ROWS * SEQ_LEN
    assert found["run"]["tokens"] == BASE.tokens
    # The step's own matmuls: the model's, what attention computes beside its window, and a head
    # that is not recomputed.
    assert 1 < found["flops"]["executed"] / found["flops"]["model"] < 1.5
    kinds = found["bytes"]["by_kind"]
    assert {"all-gather over links", "all-reduce over links"} <= kinds.keys()
    assert sum(kinds.values()) == pytest.approx(found["bytes"]["links"])
    seconds = found["seconds"]
    parts = [seconds[name] for name in ("compute", "memory", "links", "network")]
    assert seconds["step"] == max(parts)
    assert seconds["one_after_another"] == pytest.approx(sum(parts))
    assert found["tokens_per_s"] == pytest.approx(ROWS * SEQ_LEN / seconds["step"])
    json.dumps(found, allow_nan=False)
    text = table.text(found)
    assert "fits" in text
    assert f"{found['memory']['total'] / 2**30:.3f}" in text


def test_a_plan_is_compiled_once(here, plans, monkeypatch):
    before = set(plans.rglob("*.json"))
    first = run.plan(Task("teacher", TAUGHT), EIGHT)
    assert len(set(plans.rglob("*.json")) - before) == 1
    monkeypatch.setattr(compiling, "_compile", None)
    again = run.plan(Task("teacher", TAUGHT), EIGHT)
    assert again == first
    assert first["shards"]["most_bytes_per_token"] == 8 + 4 * 6


def test_jax_keeps_nothing_of_chips_that_are_not_here(tmp_path):
    """Its own cache is off for as long as a plan is made, and on again after an error."""
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", str(tmp_path))
        with contextlib.suppress(ZeroDivisionError), compiling.no_cache():
            jax.jit(lambda x: x + 1).lower(np.ones(3)).compile()
            raise ZeroDivisionError
        assert not list(tmp_path.glob("*-cache"))
        jax.jit(lambda x: x + 2).lower(np.ones(3)).compile()
        assert len(list(tmp_path.glob("*-cache"))) == 1
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        reset_cache()


def test_microbatches_and_remat_need_less(here):
    """By estimate and as compiled."""
    long = dataclasses.replace(ALIKE, batch_tokens=64 * 64, seq_len=64, tokens=64 * 64)
    plain = dataclasses.replace(long, train=LoopConfig(microbatches=1))
    full = dataclasses.replace(plain, model=dataclasses.replace(long.model, remat="full"))
    cut = dataclasses.replace(plain, train=LoopConfig(microbatches=8))
    layout = abstract_layout(Task("train", plain), EIGHT)
    for make in (
        lambda task: run.plan(task, EIGHT)["memory"]["temporary"],
        lambda task: estimate_memory(task, layout).temporary,
    ):
        need = {
            name: make(Task("train", one))
            for name, one in {"plain": plain, "full": full, "cut": cut}.items()
        }
        assert need["full"] < need["plain"]
        assert need["cut"] < need["plain"]


def test_estimates_of_several_hosts():
    task = Task("train", dataclasses.replace(BASE, mesh=MeshConfig(data=-1, fsdp=4)))
    one, two = (run.estimate(task, parse_device(f"h100:{n}"))["bytes"] for n in (8, 16))
    assert one["network"] == 0 < two["network"]
    over_both = dataclasses.replace(task.experiment, mesh=MeshConfig(data=1, fsdp=16))
    gathered = run.estimate(Task("train", over_both), parse_device("h100:16"))["bytes"]
    assert gathered["network"] > two["network"]


def test_estimates_hold_what_a_step_is_given_exactly():
    task = Task("train", TAUGHT)
    estimated = estimate_memory(task, abstract_layout(task, EIGHT))
    layout = make_layout(MESH)
    traced = trace(task, layout)
    with layout.active():
        compiled = traced.program.lower().compile()
    assert estimated.parts == memory_of(compiled, traced.parts).parts


def test_a_search_ranks(here):
    plans = search.search(Task("train", ALIKE), EIGHT, 3, compiles=True)
    assert len(plans) == 3
    assert len({run.short(one) for one in plans}) == 3
    steps = [one["seconds"]["step"] for one in plans]
    assert all(one["memory"]["fits"] for one in plans)
    assert steps == sorted(steps) or len(set(steps)) > 1
    assert table.ranking(plans).count("\n") == 3
    everything = search.search(Task("train", ALIKE), EIGHT, 100, compiles=False)
    rules = {one["mesh"]["rules"] for one in everything}
    assert rules == {"dp", "fsdp", "fsdp_tp"}
    assert {one["remat"] for one in everything} == {"none", "dots", "full"}


def test_what_does_not_fit_is_mended(here):
    """On a chip with room for a part of the step's temporaries."""
    big = dataclasses.replace(
        ALIKE, batch_tokens=64 * 64, seq_len=64, tokens=64 * 64, train=LoopConfig(microbatches=1)
    )
    task = Task("train", big)
    need = run.plan(task, EIGHT)["memory"]["total"]
    guess = run.estimate(task, EIGHT)["memory"]["total"]
    small = dataclasses.replace(CHIPS["v5e"], memory=min(need, guess) * 0.9)
    tight = Hardware(small, (2, 4))
    assert not run.plan(task, tight)["memory"]["fits"]
    tried, fits = search.mend(task, tight, tries=4)
    assert fits
    assert tried[-1]["memory"]["fits"]
    assert tried[-1]["memory"]["total"] <= small.memory
    assert table.settings(tried[-1]) in table.advice(tried, fits)


def test_the_command(here, monkeypatch, capsys):
    monkeypatch.chdir(here)
    (here / "exp.py").write_text(EXPERIMENT)
    cli.main(["plan", "exp.py", "--topology", "v5e:2x4", "--set", "mesh.fsdp=2", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["mesh"] == {"data": 4, "fsdp": 2, "tensor": 1, "rules": "fsdp_tp"}
    cli.main(["plan", "exp.py", "--device", "h100:8", "--point", "b"])
    assert "by arithmetic alone" in capsys.readouterr().out
    cli.main(["plan", "exp.py", "--device", "v5e:8", "--search", "--count", "2"])
    assert "the first: --set mesh.data=" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--topology v7:4x4", "no TPU 'v7'"),
        ("--topology v5e:4x4x4", "2 dimensions"),
        ("--topology v5e:4y4", "2 dimensions"),
        ("--topology v5e:32x32", "--slices"),
        ("--device b200:8", "no device"),
        ("--device h100", "no device"),
        ("--device h100:13", "evenly"),
        ("", "--topology"),
        ("--topology v5e:2x4 --device h100:8", "--topology"),
        ("--topology v5e:2x4 --set mesh.fsdp=3", "does not fit 8 device"),
        ("--topology v5e:2x4 --set batch_tokens=96", "does not divide by the 8 devices"),
        ("--topology v5e:2x4 --step decode --rows 3", "power of two"),
        ("--device v5e:8 --step decode --rows 3", "power of two"),
        ("--device v5e:8 --rows 8", "--step decode"),
        ("--device v5e:8 --count 2", "--search"),
        ("--topology v5e:2x4 --point c", "there is no point 'c'"),
        ("--topology v5e:2x4 --step teacher --set objective=Distill(shards='s')", "who teaches"),
    ],
)
def test_wrong_input_gets_a_sentence(here, monkeypatch, capsys, options, words):
    monkeypatch.chdir(here)
    (here / "exp.py").write_text(EXPERIMENT)
    with pytest.raises(SystemExit) as stop:
        cli.main(["plan", "exp.py", *options.split()])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("stop", "code"), [(KeyboardInterrupt, INTERRUPTED_CODE), (Terminated, PREEMPTED_CODE)]
)
def test_a_signal_ends_it_with_the_code_of_every_verb(here, monkeypatch, stop, code):
    def stopped(*_):
        raise stop

    monkeypatch.setattr(run, "plan", stopped)
    monkeypatch.chdir(here)
    (here / "exp.py").write_text(EXPERIMENT)
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", "exp.py", "--topology", "v5e:2x4"])
    assert ended.value.code == code


def test_a_file_without_an_experiment(here, monkeypatch, capsys):
    (here / "none.py").write_text("x = 1\n")
    with pytest.raises(SystemExit):
        cli.main(["plan", str(here / "none.py"), "--topology", "v5e:2x4"])
    assert "defines neither BASE" in capsys.readouterr().err


def test_without_libtpu(monkeypatch):
    monkeypatch.setattr(compiling.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="GEMMA_JAX_EXTRA=cpu,plan"):
        compiling.devices_of(parse_topology("v5e:4x4"))


def test_names_of_hardware():
    assert parse_topology("v5p:2x4x4").size == 32
    assert str(parse_topology("v6e:16x16", 2)) == "2 x v6e:16x16"
    assert parse_device("h100:16") == Hardware(CHIPS["h100"], (8,), 2)
    assert parse_device("v5e:512").slices == 2
