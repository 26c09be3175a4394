"""The compiled step: which arrays cross devices, and which exist nowhere."""

import math

import jax
import pytest
from programs import collectives, shapes

from gemma_jax.model.config import ModelConfig
from gemma_jax.model.transformer import Transformer
from gemma_jax.ops import vocab_loss
from gemma_jax.sharding import MESH_AXES, MeshConfig, make_layout
from gemma_jax.training.objective import Xent
from gemma_jax.training.optim import AdamW
from gemma_jax.training.step import init_state, make_step, state_shardings

# Sizes that tell dimensions apart in a program's text.
V, D, CHUNK, ROWS = 1040, 56, 8, 48
MODEL = Transformer(
    ModelConfig(
        vocab_size=V,
        embed_dim=D,
        mlp_dim=88,
        num_layers=3,
        num_heads=4,
        num_kv_heads=1,
        head_dim=20,
        max_seq_len=64,
        attn_pattern="LG",
        sliding_window=8,
        compute_dtype="float32",
    )
)


def compiled_step(layout, batch, microbatches):
    optimizer = AdamW().build(MODEL.axes(), 10)
    fresh = lambda: init_state(MODEL.init(jax.random.key(0)), optimizer, ema=True)  # noqa: E731
    state = jax.eval_shape(fresh)
    shardings = state_shardings(layout, MODEL.axes(), state)
    state, batch = (
        jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), *pair)
        for pair in ((state, shardings), (batch, dict.fromkeys(batch, layout.batch_sharding())))
    )
    step = make_step(
        Xent().build(MODEL),
        optimizer,
        microbatches=microbatches,
        ema_decay=0.9,
        shardings=shardings.params,
    )
    with layout.active():
        step = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
        return step.lower(state, batch).compile().as_text()


def used_parameters(layout):
    """The shapes that a device may need to gather: of a parameter or of one layer of a stacked one,
    whole but for what the tensor axis splits."""
    found = set()
    for leaf, axes in zip(
        jax.tree.leaves(MODEL.shapes()),
        jax.tree.leaves(MODEL.axes(), is_leaf=lambda x: isinstance(x, tuple)),
        strict=True,
    ):
        spec = layout.spec(axes, leaf.shape)
        shape = tuple(
            size // layout.mesh.shape[axis] if axis == "tensor" else size
            for size, axis in zip(leaf.shape, spec, strict=True)
        )
        found |= {shape, (1, *shape[1:]), shape[1:]} if axes[0] == "layers" else {shape}
    return found


@pytest.mark.parametrize(
    ("rules", "mesh", "microbatches"),
    [
        ("dp", (8, 1, 1), 1),
        ("dp", (4, 2, 1), 2),
        ("fsdp", (2, 4, 1), 1),
        ("fsdp_tp", (2, 2, 2), 2),
        ("fsdp_tp", (1, 2, 4), 1),
        ("fsdp_tp", (1, 1, 8), 1),
    ],
)
def test_what_crosses_devices(make_batch, monkeypatch, rules, mesh, microbatches):
    """Parameters are gathered, sums reduced, tokens never moved; no [tokens, V] anywhere."""
    monkeypatch.setattr(vocab_loss, "_CHUNK_TOKENS", CHUNK)
    sizes = dict(zip(MESH_AXES, mesh, strict=True))
    layout = make_layout(MeshConfig(**sizes, rules=rules))
    batch = make_batch(0, rows=ROWS)
    program = compiled_step(layout, batch, microbatches)
    found, held = collectives(program), shapes(program)

    is_stored_split = rules != "dp" and sizes["fsdp"] > 1
    gathered = {c.shape for c in found if c.kind == "all-gather"}
    assert gathered <= used_parameters(layout)
    assert bool(gathered) == is_stored_split
    kinds = {c.kind for c in found}
    assert kinds <= {"all-gather", "all-reduce", "reduce-scatter"}
    assert ("reduce-scatter" in kinds) == is_stored_split  # the gradient of the table

    # Beside V there are chunks of tokens and the width of the table, nothing else.
    vocab = {V, V // sizes["tensor"] if rules == "fsdp_tp" else V}
    beside = {math.prod(shape) // max(vocab & {*shape}) for shape in held if vocab & {*shape}}
    assert CHUNK in beside
    assert beside <= {1, CHUNK, D, D // sizes["fsdp"]}

    # No device has the rows of another, in two dimensions or in one.
    T = batch["tokens"].shape[1]
    own = ROWS // layout.batch_size_multiple
    begin = {shape[:2] for shape in held} | {shape[:1] for shape in held}
    assert (own // microbatches, T) in begin
    if own < ROWS:
        for rows in (ROWS, ROWS // microbatches):
            assert not {(rows, T), (rows * T,)} & begin
