"""Adapters as functions on the parameter tree: start, merge, dropout, several in one batch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import config

from gemma_jax.errors import UserError
from gemma_jax.generation.decode import Generator, generate
from gemma_jax.generation.sampling import Sampling
from gemma_jax.model.matrix import select_rows
from gemma_jax.model.transformer import Transformer
from gemma_jax.tuning.lora import (
    ATTENTION,
    MLP,
    Lora,
    adapter_axes,
    init_adapter,
    join,
    join_many,
    merge,
)

ALL = Lora(targets=(*ATTENTION, *MLP, "embedding"), rank=4, alpha=6.0)
TOKENS = jax.random.randint(jax.random.key(2), (3, 24), 107, 600)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return Transformer(config(num_layers=5))


@pytest.fixture(scope="module")
def base(model):
    return jax.jit(model.init)(jax.random.key(0))


@pytest.fixture(scope="module")
def logits(model):
    return jax.jit(lambda params: model.logits(params, model.hidden(params, TOKENS)))


def random_adapter(model, settings, seed=0):
    fresh = init_adapter(settings, model.axes(), model.shapes(), jax.random.key(1))
    rng = np.random.default_rng(seed)
    draw = lambda x: jnp.asarray(rng.standard_normal(x.shape), jnp.float32) * 0.05  # noqa: E731
    return jax.tree.map(draw, fresh)


def test_an_adapter_starts_as_its_base(model, base, logits) -> None:
    fresh = init_adapter(ALL, model.axes(), model.shapes(), jax.random.key(1))
    np.testing.assert_array_equal(logits(join(ALL, fresh, base, None)), logits(base))


@pytest.mark.parametrize("rslora", [False, True])
def test_merged_is_unmerged(model, base, logits, rslora) -> None:
    settings = dataclasses.replace(ALL, rslora=rslora)
    assert settings.scale == (3.0 if rslora else 1.5)
    adapter = random_adapter(model, settings)
    apart, merged = (
        logits(join(settings, adapter, base, None)),
        logits(merge(settings, adapter, base)),
    )
    assert jnp.abs(apart - logits(base)).max() > 0.5
    np.testing.assert_allclose(apart, merged, rtol=0, atol=1e-5 * float(jnp.abs(merged).max()))


def test_gradients_are_those_of_the_product(model, base) -> None:
    """W + scale A B as one matrix, differentiated by JAX, against the two factors."""
    adapter = random_adapter(model, ALL)

    direction = jax.random.normal(jax.random.key(3), (*TOKENS.shape, 640))

    def loss(params):
        return (model.logits(params, model.hidden(params, TOKENS)) * direction).sum()

    ours = jax.jit(jax.grad(lambda a: loss(join(ALL, a, base, None))))(adapter)
    dense = jax.jit(jax.grad(lambda a: loss(merge(ALL, a, base))))(adapter)
    for (path, mine), theirs in zip(
        jax.tree.leaves_with_path(ours), jax.tree.leaves(dense), strict=True
    ):
        atol = 1e-5 * float(jnp.abs(theirs).max())
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=atol, err_msg=str(path))


def test_dropout_leaves_out_inputs_of_a_alone(model, base) -> None:
    settings = dataclasses.replace(ALL, targets=("down",), dropout=0.5)
    adapter = random_adapter(model, settings)
    hidden = jax.jit(lambda key: model.hidden(join(settings, adapter, base, key), TOKENS))
    first, second = hidden(jax.random.key(0)), hidden(jax.random.key(1))
    np.testing.assert_array_equal(first, hidden(jax.random.key(0)))
    assert jnp.abs(first - second).max() > 1e-3
    # With an update of zero there is nothing that dropout could change.
    fresh = init_adapter(settings, model.axes(), model.shapes(), jax.random.key(1))
    dropped = model.hidden(join(settings, fresh, base, jax.random.key(0)), TOKENS)
    np.testing.assert_array_equal(dropped, model.hidden(base, TOKENS))


def test_dropout_keeps_the_mean() -> None:
    from gemma_jax.tuning.low_rank import LowRank

    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((16, 2), (2, 3)))
    x = jnp.asarray(rng.standard_normal((4000, 16)), jnp.float32)
    x = jnp.broadcast_to(x[:1], x.shape)
    matrix = LowRank(jnp.zeros((16, 3)), a, b, jax.random.key(0), 2.0, 0.25)
    y, exact = matrix.multiply(x, 1), 2 * x[0] @ a @ b
    error = (y.mean(axis=0) - exact) / (y.std(axis=0) / 4000**0.5)
    assert float(y.std()) > 0.1
    assert float(jnp.abs(error).max()) < 4


def test_rows_of_a_batch_use_their_own_adapters(model, base, logits) -> None:
    small = Lora(targets=("query", "down"), rank=2, alpha=1.0)
    first, second = random_adapter(model, ALL, 1), random_adapter(model, small, 2)
    bank = join_many([(ALL, first), (small, second)], base)

    def run(params):
        chosen = select_rows(params, jnp.array([2, 0, 1], jnp.int32))
        return model.logits(chosen, model.hidden(chosen, TOKENS))

    ours = jax.jit(run)(bank)
    wanted = [merge(small, second, base), base, merge(ALL, first, base)]
    for row, params in enumerate(wanted):
        theirs = logits(params)[row]
        atol = 1e-5 * float(jnp.abs(theirs).max())
        np.testing.assert_allclose(ours[row], theirs, rtol=0, atol=atol)


def test_generation_switches_adapters_by_request(model, base) -> None:
    adapter = random_adapter(model, ALL, 1)
    generator = Generator(model, join_many([(ALL, adapter)], base))
    prompts = [[2, 300, 301], [2, 300, 301], [2, 400]]
    greedy = {"max_new_tokens": 12, "sampling": Sampling(temperature=0)}
    parts = list(generator.stream(prompts, adapters=[1, 0, 1], stride=5, **greedy))
    ours = np.concatenate([tokens for tokens, _ in parts], axis=1).tolist()
    with_it = generate(model, merge(ALL, adapter, base), prompts, **greedy)
    without = generate(model, base, prompts, **greedy)
    assert ours == [with_it[0].tokens, without[1].tokens, with_it[2].tokens]
    assert ours[0] != ours[1]


def test_axes_name_every_dimension(model) -> None:
    axes = adapter_axes(ALL, model.axes())
    shapes = jax.eval_shape(
        lambda: init_adapter(ALL, model.axes(), model.shapes(), jax.random.key(0))
    )
    is_axes = lambda x: isinstance(x, tuple)  # noqa: E731
    for own, shape in zip(
        jax.tree.leaves(axes, is_leaf=is_axes), jax.tree.leaves(shapes), strict=True
    ):
        assert len(own) == len(shape.shape)
        assert shape.shape[own.index(None)] == ALL.rank


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": ("q_proj",)}, "no matrix 'q_proj' to adapt; targets may be query"),
        ({"targets": ()}, "must name each matrix once"),
        ({"targets": "query"}, r'write \("query",\)'),
        ({"rank": 0}, r"Lora\.rank=0 must be positive"),
        ({"dropout": 1.0}, r"Lora\.dropout=1\.0 must"),
    ],
)
def test_bad_settings_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Lora(**changes)


def test_a_rank_is_at_most_that_of_its_matrix(model) -> None:
    with pytest.raises(UserError, match=r"Lora\.rank=5000 is above \d+, the rank that 'query'"):
        init_adapter(
            Lora(targets=("query",), rank=5000), model.axes(), model.shapes(), jax.random.key(0)
        )


def test_a_tied_model_has_no_head(model) -> None:
    with pytest.raises(UserError, match="no matrix 'head'"):
        adapter_axes(Lora(targets=("head",)), model.axes())
