"""Kernels belong to the part that their instruction's path names."""

import jax
import jax.numpy as jnp
import pytest

from gemma_jax.bench.parts import part_of, parts_of_instructions, profile


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("jit(step)/jvp(Decoder)/periods/while/body/block_0/attention/dot_general", "attention"),
        ("jit(step)/transpose(jvp(Decoder))/remainder_0/mlp/down/dot_general", "mlp"),
        ("jit(step)/jvp(Decoder)/block_0/attention/query_norm/mul", "attention"),
        ("jit(step)/jvp(Decoder)/block_0/pre_attention_norm/mul", "norms"),
        ("jit(step)/jvp(head)/while/body/dot_general", "head"),
        ("jit(step)/transpose(jvp(Decoder))/lookup/scatter-add", "lookup"),
        ("jit(step)/optimizer/mul", "optimizer"),
        ("jit(step)/jvp(Decoder)/while/body/dynamic_slice", "other"),
        ("jit(step)/headless/ahead/mlps", "other"),
        ("", "other"),
    ],
)
def test_the_first_part_of_a_path_counts(path: str, part: str) -> None:
    assert part_of(path) == part


HLO = """HloModule jit_step, is_scheduled=true

%fused_computation.1 (param_0: f32[4]) -> f32[4] {
  %param_0 = f32[4]{0} parameter(0)
  %a.1 = f32[4]{0} add(%param_0, %param_0), metadata={op_name="jit(step)/mlp/add" id=1}
  %b.1 = f32[4]{0} add(%a.1, %a.1), metadata={op_name="jit(step)/mlp/add"}
  %c.1 = f32[4]{0} add(%b.1, %b.1), metadata={op_name="jit(step)/head/add"}
  ROOT %d.1 = f32[4]{0} copy(%c.1), metadata={op_name="jit(step)/while/body/copy"}
}

ENTRY %main.9 (x: f32[4]) -> (f32[4], f32[2,2]) {
  %x = f32[4]{0:T(256)} parameter(0)
  %fusion.1 = f32[4]{0} fusion(%x), kind=kLoop, calls=%fused_computation.1, metadata={op_name="q"}
  %fusion.2 = f32[4]{0} fusion(%x), calls=%fused_computation.1, metadata={op_name="a/head/b"}
  %w = (s32[], /*index=1*/f32[4]{0}) while(%t), metadata={op_name="jit(step)/mlp/while"}
  ROOT %custom-call.7 = (f32[4], f32[2,2]) custom-call(%x), custom_call_target="gemm"
}
"""


def test_instructions_of_a_program() -> None:
    parts = parts_of_instructions(HLO)
    assert parts["fusion.1"] == "mlp"  # by majority
    assert parts["fusion.2"] == "head"  # by its own path
    assert parts["w"] is None
    assert parts["custom-call.7"] == "other"
    assert parts["x"] == "other"


def test_a_profile_finds_where_the_work_is() -> None:
    def work(x: jax.Array) -> jax.Array:
        with jax.named_scope("mlp"):
            y = x @ x @ x @ x
        with jax.named_scope("optimizer"):
            return y + 1

    step = jax.jit(work)
    x = jnp.ones((256, 256))
    program = step.lower(x).compile()
    step(x).block_until_ready()
    found = profile(lambda: step(x).block_until_ready(), program)
    assert found is not None
    shares, busy = found
    assert shares["mlp"] > 0.5
    assert sum(shares.values()) == pytest.approx(1)
    assert busy > 0
