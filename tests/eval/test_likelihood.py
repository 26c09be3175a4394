"""Likelihoods of continuations against the full forward pass, token by token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import Reference

from gemma_jax.errors import UserError
from gemma_jax.eval import likelihood
from gemma_jax.eval.likelihood import Request, likelihoods
from gemma_jax.model.config import tiny
from gemma_jax.model.transformer import Transformer


@pytest.fixture(scope="module")
def model():
    return Transformer(tiny())


@pytest.fixture(scope="module")
def params(model):
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(0.1, 0.3, x.shape), jnp.float32), model.shapes()
    )


@pytest.fixture(scope="module")
def reference(model, params):
    return Reference(model, params, 64)


def drawn(rng, *, shared):
    """Requests of all sizes around the window of 8 and the edges of buckets."""
    prefix = rng.integers(1, 128, shared).tolist()
    requests = []
    for own, sizes in (
        (1, (1, 2)),
        (9, (3, 1, 17)),
        (16, (4,)),
        (17, (16, 2, 1, 5, 3)),
        (3, (2, 2)),
    ):
        context = [*prefix, *rng.integers(1, 128, own).tolist()]
        requests.append(Request(context, [rng.integers(1, 128, n).tolist() for n in sizes]))
    return requests


@pytest.mark.parametrize(("shared", "batch_tokens"), [(0, 8192), (0, 1), (12, 8192), (12, 64)])
def test_each_continuation_is_scored_as_if_alone(
    model, params, reference, shared, batch_tokens, monkeypatch
):
    monkeypatch.setattr(likelihood, "_MIN_SHARED", 4)
    monkeypatch.setattr(likelihood, "_MIN_BUCKET", 4)
    requests = drawn(np.random.default_rng(shared), shared=shared)
    done = []
    found = likelihoods(model, params, requests, batch_tokens=batch_tokens, advance=done.append)
    assert sum(done) == len(requests)
    for request, scores in zip(requests, found, strict=True):
        expected = [reference(request.context, one) for one in request.continuations]
        np.testing.assert_allclose([s.logprob for s in scores], [e[0] for e in expected], rtol=2e-5)
        assert [s.greedy for s in scores] == [e[1] for e in expected]


@pytest.mark.parametrize(("worth", "programs"), [(0, 4), (200, 3), (10_000, 1)])
def test_fewer_programs_cost_padding_and_nothing_else(
    model, params, reference, worth, programs, monkeypatch
):
    monkeypatch.setattr(likelihood, "_PROGRAM_TOKENS", worth)
    monkeypatch.setattr(likelihood, "_MIN_BUCKET", 4)
    requests = drawn(np.random.default_rng(3), shared=0)
    batches = list(likelihood._batches(requests, 0, 8192))
    assert len({(rows, shape) for _, rows, shape in batches}) == programs
    assert sorted(number for batch, _, _ in batches for number in batch) == [0, 1, 2, 3, 4]
    for request, scores in zip(requests, likelihoods(model, params, requests), strict=True):
        expected = [reference(request.context, one)[0] for one in request.continuations]
        np.testing.assert_allclose([s.logprob for s in scores], expected, rtol=2e-5)


def test_what_the_model_would_say_is_greedy(model, params, reference):
    context = [2, 5, 9]
    best = int(reference.all(context)[-1].argmax())
    ((yes, no),) = likelihoods(model, params, [Request(context, [[best], [(best + 1) % 128]])])
    assert yes.greedy
    assert not no.greedy


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request([], [[1]]), "request 0 has an empty context"),
        (Request([1], []), "request 0 has an empty context or continuation"),
        (Request([1], [[2], []]), "empty context or continuation"),
        (Request([1] * 60, [[2] * 5]), r"request 0 has 60 \+ 5 tokens, over the model's context"),
    ],
)
def test_bad_requests_are_refused(model, request_, message):
    with pytest.raises(UserError, match=message):
        likelihoods(model, None, [request_])
