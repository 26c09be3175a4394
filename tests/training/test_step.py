"""One step: microbatches, averages, meshes; and a curve that must not move."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_jax.distill.objective import Distill
from gemma_jax.sharding import MESH_AXES, MeshConfig, make_layout
from gemma_jax.training.objective import Xent
from gemma_jax.training.optim import AdamW, Muon
from gemma_jax.training.step import init_state, make_step, state_shardings

STEPS = 20
# 20 steps of the tiny model on fixed data; a change of these numbers is a change of training.
GOLDEN = {
    "adamw": (
        *(5.487143, 5.249035, 5.027053, 4.89989, 4.431873, 4.510226, 4.200812, 4.309785),
        *(3.939685, 3.794622, 4.201979, 3.571044, 3.798514, 3.529375, 3.41498, 3.60206),
        *(3.325426, 3.159127, 3.318138, 3.131151),
    ),
    "muon": (
        *(5.487143, 5.291511, 5.242459, 5.049179, 4.772702, 4.904718, 4.556806, 4.656485),
        *(4.374206, 4.191182, 4.551854, 3.972801, 4.090964, 3.868511, 3.803553, 3.95608),
        *(3.772044, 3.584846, 3.747756, 3.637109),
    ),
}
OPTIMIZERS = {"adamw": AdamW(learning_rate=1e-2), "muon": Muon(learning_rate=1e-2)}


OBJECTIVES = {"xent": Xent(), "distill": Distill(shards="unused", hard_weight=0.3, z_loss=1e-3)}


def taught(batch, vocab):
    """A batch with targets of a teacher: three ids a token, one of them twice."""
    rng = np.random.default_rng(5)
    shape = batch["tokens"].shape
    ids = rng.integers(0, vocab, (*shape, 3)).astype(np.int32)
    weights = rng.dirichlet([1, 1, 1], shape).astype(np.float32)
    return batch | {
        "target_ids": jnp.asarray(np.concatenate([ids, ids[..., :1]], axis=-1)),
        "target_weights": jnp.asarray(np.concatenate([weights, 0 * weights[..., :1]], axis=-1)),
        "teacher_label_logprob": jnp.full(shape, -2.0),
        "teacher_entropy": jnp.full(shape, 1.0),
    }


def make_state(model, params, settings, layout):
    """(state, its shardings, optimizer) on a mesh."""
    optimizer = settings.build(model.axes(), STEPS)
    fresh = lambda: init_state(params, optimizer, ema=True)  # noqa: E731
    shardings = state_shardings(layout, model.axes(), jax.eval_shape(fresh))
    return jax.device_put(fresh(), shardings), shardings, optimizer


@pytest.fixture(scope="module")
def curve(model, params, make_batch, one_device):
    """curve(optimizer, layout=None, ...) -> (losses, last state), each combination once."""
    kept = {}

    def run(name, layout=one_device, objective="xent", microbatches=1, rows=8):
        key = (name, layout, objective, microbatches, rows)
        if key not in kept:
            kept[key] = train_steps(OPTIMIZERS[name], layout, objective, microbatches, rows)
        return kept[key]

    def train_steps(settings, layout, objective, microbatches, rows):
        state, shardings, optimizer = make_state(model, params, settings, layout)
        with layout.active():
            step = make_step(
                OBJECTIVES[objective].build(model),
                optimizer,
                microbatches=microbatches,
                ema_decay=0.9,
                shardings=shardings.params,
            )
            step = jax.jit(step, out_shardings=(shardings, None))
            losses = []
            for number in range(STEPS):
                batch = make_batch(number, rows=rows)
                if objective == "distill":
                    batch = taught(batch, model.config.vocab_size)
                batch = jax.device_put(batch, layout.batch_sharding())
                state, metrics = step(state, batch)
                losses.append(float(metrics["loss"]))
        return losses, state

    return run


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_loss_curve_is_the_golden_one(curve, name):
    losses, _ = curve(name)
    np.testing.assert_allclose(losses, GOLDEN[name], atol=1e-4)


@pytest.mark.parametrize(
    ("name", "rules", "mesh", "settings"),
    [
        ("adamw", "dp", (8, 1, 1), {}),
        ("adamw", "dp", (2, 2, 2), {"objective": "distill"}),
        ("adamw", "fsdp", (1, 8, 1), {}),
        ("adamw", "fsdp", (2, 2, 2), {"objective": "distill", "microbatches": 2}),
        ("adamw", "fsdp_tp", (2, 2, 2), {"microbatches": 2}),
        ("adamw", "fsdp_tp", (1, 4, 2), {"objective": "distill"}),
        ("adamw", "fsdp_tp", (1, 2, 4), {"objective": "distill"}),
        ("adamw", "fsdp_tp", (1, 1, 8), {}),
        ("adamw", "fsdp_tp", (1, 3, 2), {"rows": 12}),
        ("muon", "fsdp_tp", (2, 2, 2), {}),
    ],
)
def test_a_mesh_equals_one_device(curve, name, rules, mesh, settings):
    sizes = dict(zip(MESH_AXES, mesh, strict=True))
    layout = make_layout(MeshConfig(**sizes, rules=rules), jax.devices()[: math.prod(mesh)])
    losses, state = curve(name, layout, **settings)
    one_losses, one_state = curve(name, **settings)
    np.testing.assert_allclose(losses, one_losses, atol=1e-5 if name == "adamw" else 1e-4)
    for ours, theirs in zip(
        jax.tree.leaves(state.params), jax.tree.leaves(one_state.params), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-4 if name == "adamw" else 1e-3)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moments_and_average_lie_where_their_parameter_does(model, params, name):
    layout = make_layout(MeshConfig(data=2, fsdp=2, tensor=2))
    optimizer = OPTIMIZERS[name].build(model.axes(), STEPS)
    shapes = jax.eval_shape(lambda: init_state(params, optimizer, ema=True))
    shardings = state_shardings(layout, model.axes(), shapes)
    assert shardings.ema == shardings.params
    place = {  # the leaf's own names, from the parameter's first on
        jax.tree_util.keystr(path): sharding
        for path, sharding in jax.tree.leaves_with_path(shardings.params)
    }
    assert any(not sharding.is_fully_replicated for sharding in place.values())
    moments = dict.fromkeys(place, 0)
    for path, sharding in jax.tree.leaves_with_path(shardings.opt_state):
        name = jax.tree_util.keystr(path)
        owner = next((own for own in place if name.endswith(own)), None)
        if owner is None:
            assert sharding.is_fully_replicated
        else:
            assert sharding == place[owner]
            moments[owner] += 1
    assert min(moments.values()) >= 1  # one for Muon, two for Adam


@pytest.mark.parametrize("microbatches", [2, 4])
def test_microbatches_are_one_batch(model, params, make_batch, microbatches):
    """Rows hold different numbers of labels, so a mean of means would show."""
    batch = make_batch(0)
    # Without momentum's sign-like first step, differences of the gradient stay visible.
    optimizer = AdamW(learning_rate=1e-2, eps=1.0, clip_norm=None).build(model.axes(), 4)
    results = []
    for k in (1, microbatches):
        step = jax.jit(make_step(Xent(z_loss=1e-3).build(model), optimizer, microbatches=k))
        results.append(step(init_state(params, optimizer, ema=False), batch))
    (one, one_metrics), (many, many_metrics) = results
    for ours, theirs in zip(jax.tree.leaves(many.params), jax.tree.leaves(one.params), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    for name, value in one_metrics.items():
        np.testing.assert_allclose(many_metrics[name], value, rtol=2e-6, atol=2e-6)


def test_average_follows_the_parameters(curve, model, params, make_batch):
    optimizer = AdamW(learning_rate=1e-2).build(model.axes(), STEPS)
    step = jax.jit(make_step(Xent().build(model), optimizer, ema_decay=0.75))
    state = init_state(params, optimizer, ema=True)
    average = params
    for number in range(2):
        state, _ = step(state, make_batch(number))
        average = jax.tree.map(lambda old, new: 0.75 * old + 0.25 * new, average, state.params)
    assert int(state.step) == 2
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), state.ema, average)


def test_metrics_of_a_step_by_hand(model, params, make_batch):
    batch = make_batch(3)
    optimizer = AdamW(learning_rate=1e-2).build(model.axes(), STEPS)
    step = jax.jit(make_step(Xent().build(model), optimizer))
    after, metrics = step(init_state(params, optimizer, ema=False), batch)

    def dense(params):
        hidden = model.hidden(params, batch["tokens"], batch["positions"], batch["segment_ids"])
        logits = hidden @ model.output_embedding(params).T
        nats = -jax.nn.log_softmax(logits)
        nats = jnp.take_along_axis(nats, batch["labels"][..., None], axis=-1)[..., 0]
        mean = (nats * batch["loss_mask"]).sum() / batch["loss_mask"].sum()
        return mean, logits

    (loss, logits), gradient = jax.jit(jax.value_and_grad(dense, has_aux=True))(params)
    mask = np.asarray(batch["loss_mask"])
    hits = (np.asarray(logits).argmax(-1) == np.asarray(batch["labels"])) * mask
    square = lambda tree: sum(float((x**2).sum()) for x in jax.tree.leaves(tree))  # noqa: E731
    expected = {
        "loss": loss,
        "cross_entropy": loss,
        "accuracy": hits.sum() / mask.sum(),
        "grad_norm": square(gradient) ** 0.5,
        "param_norm": square(after.params) ** 0.5,
    }
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, err_msg=name)
