"""Sampled targets: unbiased, exact in number, independent of the batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import collectives
from scipy.special import log_softmax, softmax

from gemma_jax.distill import mass_tree
from gemma_jax.distill.mass_tree import VocabSplit
from gemma_jax.distill.sampling import METHODS, sample_targets, token_keys

V, N, TRIALS = 512, 50, 20_000
_sample = jax.jit(sample_targets, static_argnames=("draws", "method"))


def _keys(n, seed=0, record=0):
    return token_keys(jax.random.key(seed), jnp.asarray([record]), n)[0]


def _draw(logits, draws=N, method="systematic", labels=None, seed=0):
    logits = np.atleast_2d(np.asarray(logits, np.float32))
    labels = np.zeros(len(logits), np.int32) if labels is None else labels
    return _sample(
        jnp.asarray(logits),
        jnp.asarray(labels),
        _keys(len(logits), seed),
        draws=draws,
        method=method,
    )


def _dense(ids, counts, size):
    """Counts [n, size]."""
    ids, counts = np.asarray(ids), np.asarray(counts)
    places = np.arange(len(ids))[:, None] * size + ids
    dense = np.bincount(places.ravel(), counts.ravel(), minlength=len(ids) * size)
    return dense.reshape(len(ids), size).astype(np.int32)


@pytest.fixture(scope="module")
def teacher_logits():
    return np.random.default_rng(0).normal(size=V).astype(np.float32) * 2.5


@pytest.fixture(scope="module")
def trials(teacher_logits):
    """method -> counts [TRIALS, V] of one distribution drawn many times."""
    logits = np.broadcast_to(teacher_logits, (4_000, V))
    drawn = {}
    for method in METHODS:
        parts = [_draw(logits, method=method, seed=seed) for seed in range(TRIALS // 4_000)]
        drawn[method] = np.concatenate([_dense(p.ids, p.counts, V) for p in parts])
    return drawn


def _largest_z(weights, target):
    """max |z| of the mean gradient softmax(z) sum(w) - w against softmax(z) - t.

    All estimators here have sum(w) = 1, so the student's softmax cancels and the gradient's error
    is t - w. Ids too rare for a normal approximation are pooled into one.
    """
    common = target * len(weights) * N > 100
    pooled = np.append(weights[:, common], weights[:, ~common].sum(1, keepdims=True), axis=1)
    expected = np.append(target[common], target[~common].sum())
    error = pooled.mean(0) - expected
    return np.max(np.abs(error) / (pooled.std(0, ddof=1) / np.sqrt(len(weights)) + 1e-12))


@pytest.mark.parametrize("method", METHODS)
def test_expected_target_is_the_teacher(method, trials, teacher_logits):
    target = softmax(teacher_logits.astype(np.float64))
    assert _largest_z(trials[method] / N, target) < 5


def test_biased_estimators_fail_the_same_test(trials, teacher_logits):
    """Negative controls: what the test must be able to see."""
    target = softmax(teacher_logits.astype(np.float64))
    unique = (trials["multinomial"] > 0) * target
    unique /= unique.sum(1, keepdims=True)
    assert _largest_z(unique, target) > 100
    # Top-k does not vary: a jitter far below its bias stands for the sampling error.
    top = np.where(target >= np.sort(target)[-N], target, 0)
    jitter = np.random.default_rng(1).normal(scale=1e-4, size=(TRIALS, V)) * target
    assert _largest_z(top / top.sum() + jitter, target) > 100


def test_systematic_draws_have_less_than_half_the_error(trials, teacher_logits):
    target = softmax(teacher_logits.astype(np.float64))
    error = {m: ((trials[m] / N - target) ** 2).sum(1).mean() for m in METHODS}
    assert 2 * error["systematic"] < error["multinomial"]


def test_systematic_counts_are_floor_or_ceil(trials, teacher_logits):
    """Each id gets N p rounded down or up, by the dense formula; 1e-3 allows for rounding."""
    mean = N * softmax(teacher_logits.astype(np.float64))
    counts = trials["systematic"]
    assert np.all(counts >= np.floor(mean - 1e-3))
    assert np.all(counts <= np.ceil(mean + 1e-3))


def test_systematic_equals_the_dense_formula(teacher_logits):
    """floor(N F_i + u) - floor(N F_{i-1} + u), where the code calls 1 - u what is u here."""
    keys = _keys(64)
    u = 1.0 - np.asarray(jax.vmap(lambda k: jax.random.uniform(k, ()))(keys), np.float64)
    ends = np.cumsum(softmax(teacher_logits.astype(np.float64)))
    ends[-1] = 1.0
    dense = np.diff(np.floor(N * ends + u[:, None] - 1e-12), prepend=0, axis=1)
    drawn = _draw(np.broadcast_to(teacher_logits, (64, V)))
    assert np.mean(np.any(_dense(drawn.ids, drawn.counts, V) != dense, axis=1)) < 0.02


def _cases(size):
    rng = np.random.default_rng(3)
    one_hot = np.full(size, -np.inf)
    one_hot[size - 1] = 0.0
    some = np.full(size, -np.inf)
    some[rng.choice(size, 5, replace=False)] = rng.normal(size=5)
    below = np.full(size, -120.0)
    below[size // 3] = 0.0
    return np.stack(
        [
            np.zeros(size),
            rng.normal(size=size) * 3,
            rng.normal(size=size) * 30,
            np.where(np.arange(size) == 7, 40.0, rng.normal(size=size)),
            one_hot,
            some,
            below,
            rng.normal(size=size) * 3 + 3e4,
        ]
    ).astype(np.float32)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [1, 129, 8192, 262_144])
def test_counts_are_exact_for_any_shape_of_distribution(size, method):
    logits = _cases(max(size, 8))[:, :size] if size < 8 else _cases(size)
    logits = np.where(np.isneginf(logits).all(1, keepdims=True), 0, logits)
    drawn = _draw(logits, draws=64, method=method)
    ids, counts = np.asarray(drawn.ids), np.asarray(drawn.counts)
    assert ids.shape == counts.shape == (len(logits), 64)
    assert np.all(counts.sum(1) == 64)
    assert np.all((ids >= 0) & (ids < size))
    for row in range(len(logits)):
        used = ids[row][counts[row] > 0]
        assert np.all(np.diff(used) > 0)
        assert np.all(softmax(logits[row].astype(np.float64))[used] > 0)


def _assert_statistics(drawn, logits, labels):
    logp = log_softmax(logits.astype(np.float64), axis=1)
    p = np.exp(logp)
    entropy = -np.where(p > 0, p * np.where(p > 0, logp, 0), 0).sum(1)
    np.testing.assert_allclose(drawn.entropy, entropy, rtol=2e-5, atol=2e-5)
    expected = np.take_along_axis(logp, labels[:, None], 1)[:, 0]
    np.testing.assert_allclose(drawn.label_logprob, expected, rtol=2e-6, atol=2e-6)


def test_statistics_of_the_teacher():
    for size in (8, 262_144):
        logits = _cases(size)
        labels = np.argsort(-logits, axis=1)[:, 0].astype(np.int32)
        _assert_statistics(_draw(logits, labels=labels), logits, labels)


@pytest.fixture
def one_pass(monkeypatch):
    """`sample_targets` as it is compiled for a GPU."""
    monkeypatch.setattr(mass_tree, "on_gpu", lambda: True)
    return lambda *given, **settings: sample_targets(*given, **settings)  # not the one compiled


@pytest.mark.parametrize("size", [8, 300, 262_144])
def test_one_reading_of_the_logits_tells_the_same(size, one_pass):
    """Whatever the label is: the likeliest id, one far below it, one that is excluded."""
    cases, rng = _cases(size), np.random.default_rng(7)
    order = np.argsort(-cases, axis=1)
    labels = np.stack([order[:, 0], order[:, size // 2], order[:, -1], rng.integers(size, size=8)])
    logits, labels = np.tile(cases, (4, 1)), labels.reshape(-1).astype(np.int32)
    run = jax.jit(functools.partial(one_pass, draws=64, method="systematic"))
    drawn = run(jnp.asarray(logits), jnp.asarray(labels), _keys(len(logits)))
    _assert_statistics(drawn, logits, labels)
    dense = _dense(drawn.ids, drawn.counts, size)
    assert np.all(dense.sum(1) == 64)
    assert np.all(softmax(logits.astype(np.float64), axis=1)[dense > 0] > 0)
    usual = _draw(logits, draws=64, labels=labels)
    # Rounding moves a draw that lies at the edge of an id to the neighbour.
    assert np.abs(dense - _dense(usual.ids, usual.counts, size)).sum() <= 0.01 * dense.sum()


@pytest.mark.parametrize("size", [300, 8192])
def test_one_reading_draws_the_same_with_a_split_vocabulary(size, one_pass):
    logits = _cases(size)
    labels = jnp.arange(len(logits), dtype=jnp.int32) * (size // 9)
    settings = {"draws": 64, "method": "systematic"}
    whole = jax.jit(functools.partial(one_pass, **settings))(
        jnp.asarray(logits), labels, _keys(len(logits))
    )
    got, _ = _draw_split(one_pass, logits, labels, 4, **settings)
    np.testing.assert_array_equal(got.ids, whole.ids)
    np.testing.assert_array_equal(got.counts, whole.counts)
    np.testing.assert_allclose(got.entropy, whole.entropy, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("method", METHODS)
def test_draws_do_not_depend_on_the_batch(method):
    rng = np.random.default_rng(5)
    logits = jnp.asarray(rng.normal(size=(24, 1000)).astype(np.float32))
    labels = jnp.zeros(24, jnp.int32)
    keys = _keys(24)
    whole = _sample(logits, labels, keys, draws=N, method=method)
    order = jnp.asarray(rng.permutation(24))
    moved = _sample(logits[order], labels, keys[order], draws=N, method=method)
    np.testing.assert_array_equal(whole.ids[order], moved.ids)
    for a, b in ((0, 1), (1, 24)):
        part = _sample(logits[a:b], labels[a:b], keys[a:b], draws=N, method=method)
        for name in ("ids", "counts"):
            np.testing.assert_array_equal(getattr(part, name), getattr(whole, name)[a:b])
        # Sums of other shapes may be compiled to another order of additions.
        np.testing.assert_allclose(part.entropy, whole.entropy[a:b], rtol=1e-6)
        np.testing.assert_allclose(part.label_logprob, whole.label_logprob[a:b], rtol=1e-6)


def test_keys_depend_on_record_and_place_alone():
    base = jax.random.key(3)
    many = jax.random.key_data(token_keys(base, jnp.asarray([4, 9, 2]), 16))
    one = jax.random.key_data(token_keys(base, jnp.asarray([9]), 8))
    np.testing.assert_array_equal(many[1, :8], one[0])
    assert len(np.unique(np.asarray(many).reshape(-1, 2), axis=0)) == 48


def _draw_split(sample, logits, labels, devices, **settings):
    """What is drawn with the vocabulary split over devices, and the program."""
    size = logits.shape[1]
    split = VocabSplit("vocab", devices, size)
    padded = np.pad(logits, ((0, 0), (0, split.padded_size - size)), constant_values=-np.inf)
    mesh = jax.make_mesh((devices,), ("vocab",), axis_types=(jax.sharding.AxisType.Auto,))
    part, same = jax.sharding.PartitionSpec(None, "vocab"), jax.sharding.PartitionSpec()
    run = functools.partial(sample, split=split, **settings)
    run = jax.shard_map(
        run, mesh=mesh, in_specs=(part, same, same), out_specs=same, check_vma=False
    )
    given = jnp.asarray(padded), labels, _keys(len(logits))
    with jax.set_mesh(mesh):
        return jax.jit(run)(*given), jax.jit(run).lower(*given).compile()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("size", "devices"), [(8192, 8), (8192, 2), (262_144, 8), (640, 4), (300, 4), (129, 8)]
)
def test_a_split_vocabulary_gives_the_same_draws(size, devices, method):
    """Masses alone cross devices: draws equal, also where V does not divide and is padded."""
    logits = np.where(np.isneginf(_cases(size)).all(1, keepdims=True), 0, _cases(size))
    labels = jnp.arange(len(logits), dtype=jnp.int32) * (size // 9)
    keys = _keys(len(logits))
    whole = _sample(jnp.asarray(logits), labels, keys, draws=64, method=method)

    got, compiled = _draw_split(sample_targets, logits, labels, devices, draws=64, method=method)
    np.testing.assert_array_equal(got.ids, whole.ids)
    np.testing.assert_array_equal(got.counts, whole.counts)
    np.testing.assert_allclose(got.label_logprob, whole.label_logprob, rtol=1e-6)
    np.testing.assert_allclose(got.entropy, whole.entropy, rtol=2e-5, atol=2e-5)
    gathered = [c.shape for c in collectives(compiled.as_text()) if c.kind == "all-gather"]
    split = VocabSplit("vocab", devices, size)
    assert gathered == [(len(logits), split.padded_size // 32**split.height)]
