"""Programs whose collectives are known by arithmetic."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from gemma_jax.plan.chips import CHIPS
from gemma_jax.plan.flops import count_flops
from gemma_jax.plan.hlo import Program
from gemma_jax.plan.roofline import roofline, traffic

P = PartitionSpec
ROWS, WIDTH, TURNS, INNER = 16, 32, 5, 3
SIZE = ROWS * WIDTH * 4  # bytes of the array that crosses


@pytest.fixture(scope="module")
def mesh():
    return Mesh(np.array(jax.devices()).reshape(2, 4), ("a", "b"))


def compile_it(mesh, run, spec=None, out=None):
    spec, out = spec or P(), out or P()
    wrapped = jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=out, check_vma=False)
    x = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32)
    text = jax.jit(wrapped).lower(x).compile().as_text()
    return Program(text, mesh.size).collectives()


def test_loops_count_as_often_as_they_turn(mesh):
    def run(x):
        def outer(x, _):
            def inner(x, _):
                return jnp.sin(jax.lax.psum(x, "b")), None

            x = jax.lax.scan(inner, x, None, length=INNER)[0]
            return jnp.cos(jax.lax.psum(x, "a")), None

        return jax.lax.scan(outer, x, None, length=TURNS)[0]

    found = {one.groups.shape: one for one in compile_it(mesh, run)}
    along_b, along_a = found[2, 4], found[4, 2]
    assert along_b.times == TURNS * INNER
    assert along_a.times == TURNS
    assert {one.kind for one in found.values()} == {"all-reduce"}
    assert along_b.bytes == along_a.bytes == SIZE
    assert along_b.sent == 2 * SIZE * 3 / 4
    assert along_a.sent == 2 * SIZE / 2
    np.testing.assert_array_equal(along_a.groups, [[0, 4], [1, 5], [2, 6], [3, 7]])
    np.testing.assert_array_equal(along_b.groups, [[0, 1, 2, 3], [4, 5, 6, 7]])


@pytest.mark.parametrize(
    ("run", "out", "kind", "sent"),
    [
        (lambda x: jax.lax.all_gather(x, "b", tiled=True), P(), "all-gather", 4 * SIZE * 3 / 4),
        (
            lambda x: jax.lax.psum_scatter(x, "b", tiled=True),
            P("b"),
            "reduce-scatter",
            SIZE * 3 / 4,
        ),
        (
            lambda x: jax.lax.ppermute(x, "b", [(i, (i + 1) % 4) for i in range(4)]),
            P(),
            "collective-permute",
            SIZE,
        ),
        (
            lambda x: jax.lax.all_to_all(x, "b", 0, 1, tiled=True),
            P(),
            "all-to-all",
            SIZE * 3 / 4,
        ),
    ],
)
def test_what_a_chip_sends(mesh, run, out, kind, sent):
    (one,) = compile_it(mesh, lambda x: run(jnp.sin(x)), out=out)
    assert (one.kind, one.times) == (kind, 1)
    assert one.sent == sent


def test_a_loop_without_a_bound_turns_once(mesh):
    def run(x):
        return jax.lax.while_loop(lambda x: x.sum() > 0, lambda x: jax.lax.psum(x, "a") - 1, x)

    (one,) = compile_it(mesh, run)
    assert one.times == 1


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups=[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups={{0,2},{1,3}}", [[0, 2], [1, 3]]),
        ("replica_groups={}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("replica_groups=mesh['x'=2,'y'=2,'z'=2] {'x','z'}", [[0, 1, 4, 5], [2, 3, 6, 7]]),
        ("replica_groups=mesh['x'=8] {'x':(2)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
    ],
)
def test_groups_as_xla_spells_them(text, groups):
    program = (
        "ENTRY %main (x: f32[4]) -> f32[4] {\n"
        f"  %x.1 = f32[4]{{0}} all-reduce(%x), channel_id=1, {text}, to_apply=%add\n}}\n"
    )
    (one,) = Program(program, 8).collectives()
    np.testing.assert_array_equal(one.groups, groups)


def test_the_trip_count_of_a_condition_without_a_note():
    """As the compiler of TPUs leaves it."""
    program = """
%turns (p: (s32[], f32[8])) -> pred[] {
  %constant.7 = s32[]{:T(128)} constant(12)
  %p = (s32[]{:T(128)}, f32[8]{0:T(256)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt.1 = pred[]{:T(512)} compare(%i, %constant.7), direction=LT, metadata={op_name="lt"}
}

%body (p.1: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p.1 = (s32[]{:T(128)}, f32[8]{0:T(256)}) parameter(0)
  %x = f32[8]{0:T(256)S(1)} get-tuple-element(%p.1), index=1
  %start = (f32[8]{0}, f32[32]{0}) all-gather-start(%x), replica_groups=[2,4]<=[8], dimensions={0}
  %done = f32[32]{0} all-gather-done(%start)
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %loop = (s32[], f32[8]{0}) while(%t), condition=%turns, body=%body, metadata={op_name="while"}
}
"""
    (one,) = Program(program, 8).collectives()
    assert (one.kind, one.times, one.bytes) == ("all-gather", 12, 32 * 4)
    assert one.sent == 32 * 4 * 3 / 4


def test_a_collective_beside_other_work_is_one():
    """The compiler of TPUs spreads it over the fusions that it runs beside."""
    program = """
%beside.1 (a: bf16[1,16,512]) -> bf16[1,128,512] {
  %g.1 = bf16[1,128,512]{2,1,0:T(8,128)(2,1)} all-gather(%a), channel_id=18, \
replica_groups=mesh['fsdp'=8] {'fsdp'}, dimensions={1}
}

%beside.2 (a: bf16[1,16,512]) -> bf16[1,128,512] {
  %g.2 = bf16[1,128,512]{2,1,0:T(8,128)(2,1)S(1)} all-gather(%a), channel_id=18, \
replica_groups=mesh['fsdp'=8] {'fsdp'}, dimensions={1}
}

%all-reduce-scatter.3 (a: bf16[128,64]) -> bf16[16,64] {
  %r = bf16[128,64]{1,0} all-reduce(%a), channel_id=19, replica_groups=[1,8]<=[8], to_apply=%add
}

ENTRY %main (x: bf16[1,16,512]) -> bf16[16,64] {
  %f.1 = bf16[1,128,512]{2,1,0} fusion(%x), kind=kCustom, calls=%beside.1
  %f.2 = bf16[1,128,512]{2,1,0} fusion(%f.1), kind=kCustom, calls=%beside.2
  ROOT %f.3 = bf16[16,64]{1,0} fusion(%f.2), kind=kCustom, calls=%all-reduce-scatter.3
}
"""
    gathered, scattered = Program(program, 8).collectives()
    assert (gathered.kind, gathered.bytes, gathered.times) == ("all-gather", 128 * 512 * 2, 1)
    assert (scattered.kind, scattered.sent) == ("reduce-scatter", 128 * 64 * 2 * 7 / 8)


def test_slices_send_their_shares_over_the_network(mesh):
    """An all-reduce over two slices of four chips: a ring within each, and of each chip's quarter
    one across."""
    (one,) = compile_it(mesh, lambda x: jax.lax.psum(jnp.sin(x), ("a", "b")))
    slice_of = np.repeat([0, 1], 4)
    sent = traffic([one], slice_of)
    assert sent.links == 2 * SIZE * 3 / 4
    assert sent.network == 2 * (SIZE / 4) / 2
    whole = traffic([one], np.zeros(8, int))
    assert (whole.links, whole.network) == (2 * SIZE * 7 / 8, 0)
    times = roofline(CHIPS["v5e"], 197e12, 819e9 / 2, sent)
    assert times.compute == 1
    assert times.memory == 0.5
    assert times.bound == "compute"
    assert times.links == sent.links / 200e9


def test_flops_of_matmuls_in_loops():
    w = jnp.zeros((8, 8))

    def layer(x, _):
        return jnp.sin(x @ w), None

    def loss(x):
        return jax.lax.scan(jax.checkpoint(layer), x, None, length=6)[0].sum()

    x = jnp.zeros((4, 8))
    forward = 2 * 4 * 8 * 8 * 6
    assert count_flops(jax.make_jaxpr(loss)(x).jaxpr) == forward
    # Backward multiplies by w once a layer, and computes each layer's product again.
    assert count_flops(jax.make_jaxpr(jax.grad(loss))(x).jaxpr) == 3 * forward
