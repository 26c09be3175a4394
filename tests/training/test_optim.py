"""Which parameter gets what: kinds, decay, Muon's dimensions; schedules and clipping."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_jax.errors import UserError
from gemma_jax.model.config import tiny
from gemma_jax.model.transformer import Transformer
from gemma_jax.training.optim import (
    AdamW,
    Cosine,
    Muon,
    WarmupStableDecay,
    kind,
    matrix_dimensions,
)

MODEL = Transformer(tiny())
IS_AXES = {"is_leaf": lambda x: isinstance(x, tuple)}


def named(axes):
    """{short name: axes} of the tiny model's parameters."""
    leaves = jax.tree.leaves_with_path(axes, **IS_AXES)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): names for path, names in leaves}


def test_kinds_follow_the_logical_axes():
    kinds = {}
    for name, axes in named(MODEL.axes()).items():
        kinds.setdefault(kind(axes), set()).add(name)
    assert kinds["embedding"] == {"embedder/embedding"}
    assert all("norm" in name for name in kinds["norm"])
    assert not any("norm" in name for name in kinds["matrix"])
    assert {name.rsplit("/", 1)[-1] for name in kinds["matrix"]} == SIDES.keys()


# Leaf -> (axes summed over, axes produced) without the stacked layers' axis in front.
SIDES = {
    "query": ((0,), (1, 2)),
    "key": ((0,), (1, 2)),
    "value": ((0,), (1, 2)),
    "output": ((0, 1), (2,)),
    "gate": ((0,), (1,)),
    "up": ((0,), (1,)),
    "down": ((0,), (1,)),
}


def test_muon_knows_which_axes_a_matrix_sums_over():
    found = set()
    for name, axes in named(MODEL.axes()).items():
        dimensions = matrix_dimensions(axes)
        if kind(axes) != "matrix":
            assert dimensions is None
            continue
        found.add(leaf := name.rsplit("/", 1)[-1])
        stacked = int("layers" in axes)
        expected = tuple(tuple(axis + stacked for axis in side) for side in SIDES[leaf])
        assert (dimensions.reduction_axis, dimensions.output_axis) == expected, name
    assert found == SIDES.keys()


# One parameter of each sort, for updates that compile quickly.
AXES = {
    "embedding": ("vocab", "embed"),
    "query": ("layers", "embed", "heads", "head_dim"),
    "down": ("mlp", "embed"),
    "norm": ("layers", "embed"),
}
SHAPES = {"embedding": (12, 8), "query": (2, 8, 2, 4), "down": (16, 8), "norm": (2, 8)}


def first_update(settings, gradient_of=jnp.zeros_like):
    params = {name: jnp.ones(shape) for name, shape in SHAPES.items()}
    optimizer = settings.build(AXES, 10)
    with jax.numpy_dtype_promotion("standard"):
        gradient = jax.tree.map(gradient_of, params)
        updates, _ = jax.jit(optimizer.update)(gradient, optimizer.init(params), params)
    return updates


@pytest.mark.parametrize("optimizer", [AdamW, Muon])
@pytest.mark.parametrize("decayed", [("matrix", "embedding"), ("matrix",), ("norm",)])
def test_weight_decay_reaches_the_kinds_it_names(optimizer, decayed):
    """With a gradient of zero, the update is the decay alone: -rate * decay * parameter."""
    schedule = WarmupStableDecay(warmup=0.1)
    settings = optimizer(learning_rate=0.5, weight_decay=0.2, decayed=decayed, schedule=schedule)
    updates = first_update(settings)
    for name, update in updates.items():
        expected = -0.1 if kind(AXES[name]) in decayed else 0.0
        np.testing.assert_allclose(update, expected, atol=1e-6, err_msg=name)


def test_muon_updates_matrices_to_the_size_of_adams_and_adam_the_rest():
    """The update of a matrix has orthogonal rows or columns and a root mean square of 0.2 rates."""
    rng = np.random.default_rng(0)
    settings = Muon(learning_rate=0.5, weight_decay=0.0, schedule=WarmupStableDecay(warmup=0.1))
    updates = first_update(settings, lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32))
    for name, update in updates.items():
        if kind(AXES[name]) == "matrix":
            root = float(jnp.sqrt((update**2).mean()))
            assert root == pytest.approx(0.5 * 0.2, rel=0.25), name
        else:  # Adam's first step is the sign
            np.testing.assert_allclose(jnp.abs(update), 0.5, rtol=1e-4, err_msg=name)


def test_adam_rate_of_muon():
    settings = Muon(
        learning_rate=0.5,
        adam_learning_rate=0.25,
        weight_decay=0.0,
        schedule=WarmupStableDecay(warmup=0.1),
    )
    updates = first_update(settings, jnp.ones_like)
    np.testing.assert_allclose(jnp.abs(updates["embedding"]), 0.25, rtol=1e-4)


def test_gradients_are_clipped_by_their_global_norm():
    """A gradient ten times too long updates as one of norm 1; Adam's eps makes its size visible."""
    size = sum(x.size for x in map(np.zeros, SHAPES.values()))
    long = first_update(
        AdamW(learning_rate=0.5, eps=1.0, weight_decay=0.0),
        lambda x: jnp.full_like(x, 10 / size**0.5),
    )
    unit = first_update(
        AdamW(learning_rate=0.5, eps=1.0, weight_decay=0.0, clip_norm=None),
        lambda x: jnp.full_like(x, 1 / size**0.5),
    )
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), long, unit)


def test_warmup_stable_decay_at_known_steps():
    schedule = WarmupStableDecay(warmup=0.1, decay=0.4, final=0.1).build(2.0, 100)
    values = {0: 0.2, 5: 1.1, 10: 2.0, 60: 2.0, 80: 1.1, 100: 0.2, 150: 0.2}
    for step, value in values.items():
        assert float(schedule(step)) == pytest.approx(value, rel=1e-5), step


def test_cosine_at_known_steps():
    schedule = Cosine(warmup=0.1, final=0.2).build(2.0, 110)  # 11 steps of warmup
    values = {0: 2 / 11, 11: 2.0, 44: 1.6, 77: 0.8, 110: 0.4, 200: 0.4}
    for step, value in values.items():
        assert float(schedule(step)) == pytest.approx(value, rel=1e-5), step


@pytest.mark.parametrize("schedule", [WarmupStableDecay(), Cosine()])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_schedules_of_very_short_runs_are_finite(schedule, steps):
    rates = [float(schedule.build(1.0, steps)(step)) for step in range(steps)]
    assert all(0 < rate <= 1 for rate in rates), rates


def test_bad_settings_are_refused():
    with pytest.raises(UserError, match="learning_rate=0"):
        AdamW(learning_rate=0.0)
    with pytest.raises(UserError, match=r"warmup=1\.5"):
        WarmupStableDecay(warmup=1.5)
    with pytest.raises(UserError, match="clip_norm=-1"):
        Muon(clip_norm=-1.0)
