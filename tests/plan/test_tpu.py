"""Steps compiled for TPUs that are not there: runs wherever libtpu can be imported."""

import dataclasses
import importlib.util

import jax
import pytest

from gemma_jax.errors import UserError
from gemma_jax.experiment import Experiment
from gemma_jax.model.config import tiny
from gemma_jax.plan import compiling, run
from gemma_jax.plan.chips import parse_topology
from gemma_jax.plan.memory import part_bytes
from gemma_jax.plan.programs import Task, trace
from gemma_jax.sharding import MeshConfig, make_layout

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu"),
    pytest.mark.slow,
]

BASE = Experiment(
    name="planned",
    model=dataclasses.replace(tiny(), num_layers=3, compute_dtype="bfloat16"),
    data="there/is/none",
    tokens=16 * 32,
    batch_tokens=16 * 32,
    seq_len=32,
    mesh=MeshConfig(data=2, fsdp=4, rules="fsdp"),
)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(compiling, "compilation_cache", lambda: tmp_path / "jax" / "cpu")


@pytest.mark.parametrize("topology", ["v5e:2x4", "v5p:2x2x2"])
def test_the_real_step_for_one_slice(topology):
    found = run.plan(Task("train", BASE), parse_topology(topology))
    memory = found["memory"]
    assert memory["fits"]
    assert memory["temporary"] > 0
    # What is stored is what eight devices of any kind store, before padding.
    layout = make_layout(BASE.mesh, jax.devices())
    parts = part_bytes(trace(Task("train", BASE), layout).parts)
    assert {name: memory[name] for name in parts if parts[name]} == {
        name: size for name, size in parts.items() if size
    }
    kinds = found["bytes"]["by_kind"]
    assert {"all-gather over links", "reduce-scatter over links"} <= kinds.keys()
    assert found["bytes"]["network"] == 0
    assert found["flops"]["executed"] > found["flops"]["model"]


def test_gradients_alone_cross_slices():
    found = run.plan(Task("train", BASE), parse_topology("v5e:2x2", 2))
    kinds = {kind for kind in found["bytes"]["by_kind"] if kind.endswith("network")}
    assert kinds == {"all-reduce over network"}
    # Each chip sends half of what it stores of the gradients to the other slice, and gets it back
    # summed; the compiler may sum in bfloat16. Norms and metrics are few numbers more.
    stored = found["memory"]["parameters"]
    assert stored / 2 <= found["bytes"]["network"] <= stored * 1.2


def test_decoding():
    found = run.plan(Task("decode", BASE, rows=8), parse_topology("v5e:2x4"))
    assert found["memory"]["cache"] > 0
    assert found["bound"] in ("memory", "links")


def test_what_the_compiler_refuses_does_not_fit():
    rows = 1 << 20
    big = dataclasses.replace(BASE, batch_tokens=rows * 32, tokens=rows * 32)
    found = run.plan(Task("train", big), parse_topology("v5e:2x4"))
    assert found["compiled"]["refused"]
    assert not found["memory"]["fits"]
    assert found["memory"]["temporary"] > 16 << 30
    assert found["seconds"] is None


def test_a_slice_that_there_is_not():
    with pytest.raises(UserError, match="libtpu knows no such slice"):
        compiling.devices_of(parse_topology("v5e:3x5"))
