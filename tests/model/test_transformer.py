"""The decoder's own promises: counts, scan against unrolled, caches, packing, remat, settings."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_jax.errors import UserError
from gemma_jax.model.cache import cache_bytes, init_cache
from gemma_jax.model.config import PRESETS, ModelConfig, count_parameters, flops_per_token, tiny
from gemma_jax.model.transformer import Transformer

# Gemma 3 report (arXiv 2503.19786), Table 1, to the last parameter.
PUBLISHED = {
    "gemma3_270m": (167_772_160, 100_326_016, 18, 3),
    "gemma3_1b": (301_989_888, 697_896_064, 26, 4),
    "gemma3_4b": (671_088_640, 3_209_010_688, 34, 5),
    "gemma3_12b": (1_006_632_960, 10_759_155_456, 48, 8),
    "gemma3_27b": (1_409_286_144, 25_599_716_096, 62, 10),
}


@pytest.mark.parametrize("name", PRESETS)
def test_counted_parameters_are_those_of_the_tree(name):
    config = PRESETS[name]()
    leaves = jax.tree.leaves(Transformer(config).shapes())
    assert sum(leaf.size for leaf in leaves) == count_parameters(config).total
    if name in PUBLISHED:
        embedding, other, layers, global_layers = PUBLISHED[name]
        count = count_parameters(config)
        assert (count.embedding, count.other) == (embedding, other)
        assert len(config.layer_letters) == layers
        assert config.layer_letters.count("G") == global_layers


def test_flops_of_the_270m():
    """facts: body 201, head 336, attention 40 MFLOP a token forward at 2 048; x 3 for training."""
    assert flops_per_token(PRESETS["gemma3_270m"](), 2048) == pytest.approx(1.73e9, rel=0.002)


def unstack(params, config: ModelConfig):
    """The same weights for the model whose whole depth is one unrolled remainder."""
    flat = {key: value for key, value in params.items() if key != "periods"}
    for layer in range(config.num_layers):
        period, place = divmod(layer, len(config.attn_pattern))
        if period < config.num_periods:
            stacked = params["periods"][f"block_{place}"]
            flat[f"remainder_{layer}"] = jax.tree.map(lambda x, p=period: x[p], stacked)
        else:
            flat[f"remainder_{layer}"] = params[f"remainder_{place}"]
    return flat


def random_params(model, seed=0):
    """Random everywhere, norms included: a fresh model's norms are zero and hide mistakes."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(0.1, 0.3, x.shape), jnp.float32), model.shapes()
    )


@pytest.mark.parametrize(
    ("pattern", "layers"), [("LLG", 8), ("G", 3), ("L", 2), ("GL", 5), ("LLLLLG", 4), ("GLLGL", 7)]
)
def test_scan_over_periods_equals_unrolled_layers(pattern, layers):
    config = dataclasses.replace(tiny(), attn_pattern=pattern, num_layers=layers)
    model = Transformer(config)
    assert model.config.layer_letters == (pattern * layers)[:layers]
    params = random_params(model)
    # A pattern longer than the depth has no whole period: every layer is unrolled.
    unrolled = dataclasses.replace(config, attn_pattern=config.layer_letters + "L")
    tokens = jax.random.randint(jax.random.key(1), (2, 24), 0, config.vocab_size)
    hidden = jax.jit(model.hidden)(params, tokens)
    expected = jax.jit(Transformer(unrolled).hidden)(unstack(params, config), tokens)
    np.testing.assert_allclose(hidden, expected, atol=1e-5)


@functools.cache
def tiny_model(**changes):
    model = Transformer(dataclasses.replace(tiny(), **changes))
    return model, random_params(model), jax.jit(model.hidden), jax.jit(model.extend)


@pytest.mark.parametrize("pattern", ["LLG", "L", "G", "GLL"])
def test_prefill_and_decode_equal_the_full_forward(pattern):
    """At every position, past the window, in a batch of different prompt lengths."""
    model, params, full, extend = tiny_model(attn_pattern=pattern, num_layers=5)
    lengths, prefill, total = np.array([5, 17, 20]), 20, 36  # the window is 8
    tokens = jax.random.randint(jax.random.key(2), (3, total), 0, model.config.vocab_size)
    expected = np.asarray(full(params, tokens))

    cache = init_cache(model.config, 3, total)
    positions = jnp.broadcast_to(jnp.arange(prefill, dtype=jnp.int32), (3, prefill))
    real = (positions < lengths[:, None]).astype(jnp.int32)
    garbage = jnp.where(real > 0, tokens[:, :prefill], 7)
    hidden, cache = extend(params, garbage, positions, real, cache)
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(hidden[row, :length], expected[row, :length], atol=2e-5)
    for step in range(total - prefill):
        place = jnp.asarray(lengths + step, jnp.int32)[:, None]
        token = jnp.take_along_axis(tokens, place, axis=1)
        hidden, cache = extend(params, token, place, None, cache)
        want = np.take_along_axis(expected, np.asarray(place)[..., None], axis=1)
        np.testing.assert_allclose(hidden, want, atol=2e-5)


@pytest.mark.parametrize("chunks", [(3, 9, 1, 12), (1, 1, 23), (25,), (8, 8, 8, 1)])
def test_chunked_prefill_equals_the_full_forward(chunks):
    model, params, full, extend = tiny_model()
    total = sum(chunks)
    tokens = jax.random.randint(jax.random.key(3), (2, total), 0, model.config.vocab_size)
    cache, start, parts = init_cache(model.config, 2, total), 0, []
    for size in chunks:
        positions = jnp.arange(start, start + size, dtype=jnp.int32)[None].repeat(2, axis=0)
        hidden, cache = extend(params, tokens[:, start : start + size], positions, None, cache)
        parts.append(hidden)
        start += size
    np.testing.assert_allclose(jnp.concatenate(parts, 1), full(params, tokens), atol=2e-5)


def test_cache_holds_a_window_for_local_layers_and_all_for_global_ones():
    config = tiny()  # LLG, L; window 8; 2 kv heads of 8, float32
    assert cache_bytes(config, 5) == [5 * 128] * 4
    assert cache_bytes(config, 40) == [8 * 128, 8 * 128, 40 * 128, 8 * 128]
    cache = init_cache(config, 3, 40)
    held = jax.tree.map(lambda x: x.shape, cache)
    assert held.periods[0].k == (1, 3, 8, 2, 8)
    assert held.periods[2].k == (1, 3, 40, 2, 8)
    assert held.remainder[0].k == (3, 8, 2, 8)


def test_packed_documents_equal_separate_ones():
    """Values, and the gradient of one document's part with respect to everything."""
    model, params, full, _ = tiny_model()
    lengths = [11, 6, 15]
    rng = np.random.default_rng(0)
    documents = [jnp.asarray(rng.integers(0, 128, (1, n)), jnp.int32) for n in lengths]
    tokens = jnp.concatenate(documents, axis=1)
    positions = jnp.asarray(np.concatenate([np.arange(n) for n in lengths])[None], jnp.int32)
    ids = np.concatenate([np.full(n, i + 1) for i, n in enumerate(lengths)])
    segments = jnp.asarray(ids[None], jnp.int32)
    packed = full(params, tokens, positions, segments)
    separate = np.concatenate([full(params, document) for document in documents], axis=1)
    np.testing.assert_allclose(packed, separate, atol=2e-5)

    def part(params, tokens, positions, segments, start, stop):
        hidden = model.hidden(params, tokens, positions, segments)
        return jnp.square(hidden[:, start:stop]).sum()

    gradient = jax.jit(jax.grad(part), static_argnums=(4, 5))
    inside = gradient(params, tokens, positions, segments, 11, 17)
    alone = gradient(params, documents[1], None, None, 0, 6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), inside, alone)


@pytest.mark.parametrize(
    "settings",
    [{"remat": "dots"}, {"remat": "full"}, {"unroll": True}, {"unroll": True, "remat": "full"}],
)
def test_neither_remat_nor_unrolling_changes_a_gradient(settings):
    model, params, *_ = tiny_model()
    tokens = jax.random.randint(jax.random.key(1), (2, 12), 0, 128)

    def gradient(settings):
        changed = Transformer(dataclasses.replace(model.config, **settings))
        return jax.jit(jax.grad(lambda p: jnp.square(changed.hidden(p, tokens)).sum()))(params)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4),
        gradient(settings),
        gradient({"remat": "none", "unroll": False}),
    )


def test_bfloat16_compute_keeps_float32_weights():
    model = Transformer(dataclasses.replace(tiny(), compute_dtype="bfloat16"))
    params = jax.jit(model.init)(jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    tokens = jnp.zeros((1, 4), jnp.int32)
    assert jax.eval_shape(model.hidden, params, tokens).dtype == jnp.bfloat16
    grads = jax.eval_shape(
        jax.grad(lambda p: model.hidden(p, tokens).astype(jnp.float32).sum()), params
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attn_pattern": "LXG"}, "LXG"),
        ({"attn_pattern": ""}, "L .local. and G"),
        ({"num_kv_heads": 3}, "num_heads=4"),
        ({"head_dim": 7}, "head_dim=7"),
        ({"sliding_window": 0}, "sliding_window=0"),
        ({"final_softcap": -1.0}, "final_softcap"),
        ({"global_rope_scale": float("nan")}, "global_rope_scale=nan"),
    ],
)
def test_impossible_settings_are_refused(changes, words):
    with pytest.raises(UserError, match=words):
        dataclasses.replace(tiny(), **changes)
