"""Generation against the full forward pass, and the rules of sampling."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_jax.errors import UserError
from gemma_jax.generation import decode, programs, sampling
from gemma_jax.generation.decode import Generator, generate
from gemma_jax.generation.sampling import Sampling, sample
from gemma_jax.model.config import tiny
from gemma_jax.model.transformer import Transformer

GREEDY = Sampling(temperature=0.0)
NEW = 12
# Shorter and longer than the window of 8, one at the edge of a bucket of lengths.
PROMPTS = [[2, 5, 9], [2, *range(10, 30)], [7], [2, *range(40, 71)]]


@pytest.fixture(scope="module")
def model():
    config = dataclasses.replace(tiny(), num_layers=3, attn_pattern="LG", tied_embedding=False)
    return Transformer(config)


@pytest.fixture(scope="module")
def params(model):
    """Random everywhere, with a head of its own: a tied one repeats its prompt."""
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(0.1, 0.3, x.shape), jnp.float32), model.shapes()
    )


def tokens_of(model, params, prompts, **settings):
    return [c.tokens for c in generate(model, params, prompts, **settings)]


@pytest.fixture(scope="module")
def greedy(model, params):
    return tokens_of(model, params, PROMPTS, max_new_tokens=NEW, sampling=GREEDY)


@pytest.fixture(scope="module")
def full_greedy(model, params):
    """The same by the forward pass over everything so far, one token after another."""

    @jax.jit
    def next_tokens(tokens, lengths):
        hidden = model.hidden(params, tokens)
        last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
        return model.logits(params, last).argmax(-1)

    width = max(map(len, PROMPTS)) + NEW
    tokens = np.zeros((len(PROMPTS), width), np.int32)
    lengths = np.array([len(prompt) for prompt in PROMPTS], np.int32)
    for row, prompt in zip(tokens, PROMPTS, strict=True):
        row[: len(prompt)] = prompt
    for _ in range(NEW):
        tokens[np.arange(len(PROMPTS)), lengths] = next_tokens(tokens, lengths)
        lengths += 1
    return [
        row[len(prompt) : len(prompt) + NEW].tolist()
        for row, prompt in zip(tokens, PROMPTS, strict=True)
    ]


def test_greedy_is_the_argmax_of_the_full_forward_pass(greedy, full_greedy):
    assert greedy == full_greedy
    assert min(len(set(row)) for row in greedy) > 2  # it does not only repeat itself


def test_a_backend_for_whole_sequences_does_not_stop_decoding(model, params, greedy):
    banded = Transformer(dataclasses.replace(model.config, attn_backend="banded"))
    assert tokens_of(banded, params, PROMPTS, max_new_tokens=NEW, sampling=GREEDY) == greedy


def test_a_sequence_does_not_depend_on_its_batch(model, params, greedy):
    for prompt, expected in zip(PROMPTS, greedy, strict=True):
        alone = tokens_of(model, params, [prompt], max_new_tokens=NEW, sampling=GREEDY)
        assert alone == [expected]


def test_a_sequence_ends_before_its_stop_token(model, params, greedy):
    stop = greedy[0][4]
    stopped = tokens_of(
        model, params, PROMPTS, max_new_tokens=NEW, sampling=GREEDY, stop_ids=(stop,)
    )
    cut = [row[: row.index(stop)] if stop in row else row for row in greedy]
    assert stopped == cut
    assert len(stopped[0]) <= 4


def test_the_number_of_new_tokens_is_exact(model, params, greedy):
    few = tokens_of(model, params, PROMPTS, max_new_tokens=3, sampling=GREEDY)
    assert few == [row[:3] for row in greedy]


def test_sampling_follows_the_seed(model, params):
    first, same, other = (
        tokens_of(model, params, PROMPTS, max_new_tokens=NEW, seeds=seeds)
        for seeds in ((0, 1, 2, 3), (0, 1, 2, 3), (4, 1, 2, 3))
    )
    assert first == same
    assert first[0] != other[0]
    assert first[1:] == other[1:]


def test_log_probabilities_are_the_models_own(model, params, greedy):
    for prompt, completion in zip(
        PROMPTS,
        generate(model, params, PROMPTS, max_new_tokens=NEW, sampling=Sampling(top_k=3)),
        strict=True,
    ):
        tokens = jnp.asarray([[*prompt, *completion.tokens]], jnp.int32)
        logits = model.logits(params, model.hidden(params, tokens))[0, len(prompt) - 1 : -1]
        expected = jax.nn.log_softmax(logits)[np.arange(NEW), np.asarray(completion.tokens)]
        np.testing.assert_allclose(completion.logprobs, expected, atol=2e-5)
        assert not completion.stopped


def test_a_prompt_in_chunks_is_the_prompt_at_once(model, params, greedy, monkeypatch):
    monkeypatch.setattr(decode, "_CHUNK", 8)
    monkeypatch.setattr(programs, "_least", lambda *_: 4)
    assert tokens_of(model, params, PROMPTS, max_new_tokens=NEW, sampling=GREEDY) == greedy


def test_a_conversation_goes_on_in_its_cache(model, params, greedy):
    """A prompt, what it drew and more tokens, fed in three parts or in one."""
    generator, more = Generator(model, params), [11, 12, 13]
    settings = {"sampling": GREEDY, "stop_ids": ()}
    state = generator.begin(PROMPTS[:1], capacity=60, seeds=[0], sampling=GREEDY)
    state, drawn, _ = generator.advance(state, NEW, **settings)
    assert drawn[0].tolist() == greedy[0]
    _, answer, _ = generator.advance(generator.extend(state, [more]), 6, **settings)
    whole = [*PROMPTS[0], *greedy[0], *more]
    assert answer.tolist() == tokens_of(model, params, [whole], max_new_tokens=6, sampling=GREEDY)


def test_repetition_penalty_follows_its_definition(model, params):
    penalty, width = 1.7, max(map(len, PROMPTS)) + 5
    settings = Sampling(temperature=0.0, repetition_penalty=penalty)
    all_logits = jax.jit(lambda tokens: model.logits(params, model.hidden(params, tokens)))
    results = tokens_of(model, params, PROMPTS, max_new_tokens=5, sampling=settings)
    for prompt, drawn in zip(PROMPTS, results, strict=True):
        tokens = [*prompt, *drawn]
        padded = np.zeros((1, width), np.int32)
        padded[0, : len(tokens)] = tokens
        for place, logits in enumerate(np.array(all_logits(padded)[0])):
            if len(prompt) <= place + 1 < len(tokens):
                seen = sorted(set(tokens[: place + 1]))
                values = logits[seen]
                logits[seen] = np.where(values > 0, values / penalty, values * penalty)
                assert tokens[place + 1] == logits.argmax()


@pytest.mark.parametrize(
    ("prompts", "new", "message"),
    [
        ([[1], []], 4, "a prompt is empty"),
        ([], 4, "a prompt is empty"),
        ([[1]], 0, "max_new_tokens=0 must be at least 1"),
        ([[1] * 60], 5, "a prompt of 60 tokens and 5 new ones leave the model's context of 64"),
    ],
)
def test_bad_requests_are_refused(model, prompts, new, message):
    with pytest.raises(UserError, match=message):
        generate(model, None, prompts, max_new_tokens=new)


PROBABILITIES = np.array([0.4, 0.3, 0.2, 0.06, 0.04])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, PROBABILITIES),
        ({"top_k": 2}, [4 / 7, 3 / 7, 0, 0, 0]),
        ({"top_k": 99}, PROBABILITIES),
        ({"top_p": 0.65}, [4 / 7, 3 / 7, 0, 0, 0]),
        ({"top_p": 0.01}, [1, 0, 0, 0, 0]),
        ({"top_p": 1.0}, PROBABILITIES),
        ({"temperature": 0.5}, PROBABILITIES**2 / (PROBABILITIES**2).sum()),
        ({"temperature": 0.0}, [1, 0, 0, 0, 0]),
        ({"top_k": 3, "top_p": 0.5}, [4 / 7, 3 / 7, 0, 0, 0]),
        ({"min_p": 0.7}, [4 / 7, 3 / 7, 0, 0, 0]),
        ({"min_p": 1.0}, [1, 0, 0, 0, 0]),
    ],
)
def test_drawn_frequencies(settings, expected):
    count = 4000
    logits = jnp.tile(jnp.log(jnp.asarray(PROBABILITIES, jnp.float32)), (count, 1))
    draws = sample(logits, jax.random.split(jax.random.key(0), count), Sampling(**settings))
    found = np.bincount(draws, minlength=5) / count
    np.testing.assert_allclose(found, expected, atol=0.03)
    assert not found[np.asarray(expected) == 0].any()


def test_draws_from_a_large_vocabulary_follow_its_probabilities():
    """Every id by its share, z-tested; ids of probability 0 and the edges of blocks included."""
    V, count = 1003, 200_000
    rng = np.random.default_rng(0)
    logits = np.where(rng.random(V) < 0.3, -np.inf, rng.normal(0, 2, V)).astype(np.float32)
    draws = jax.jit(
        lambda keys: sample(jnp.broadcast_to(jnp.asarray(logits), (count, V)), keys, Sampling())
    )(jax.random.split(jax.random.key(1), count))
    found = np.bincount(np.asarray(draws), minlength=V)
    p = np.exp(logits.astype(np.float64))
    p /= p.sum()
    assert not found[p == 0].any()
    z = (found - count * p)[p > 0] / np.sqrt(count * p * (1 - p))[p > 0]
    assert np.abs(z).max() < 5
    assert abs(np.square(z).mean() - 1) < 0.25


@pytest.mark.parametrize("u", [0.0, np.nextafter(np.float32(1), np.float32(0))])
def test_the_ends_of_the_range_fall_on_tokens_that_may_come(u):
    logits = jnp.asarray([[-jnp.inf, 0.0, -jnp.inf, 1.0, *[-jnp.inf] * 60]])
    token = int(sampling._draw(logits, jnp.asarray([u], jnp.float32))[0])
    assert token == (1 if u == 0 else 3)


def test_bad_sampling_is_refused():
    for settings in ({"temperature": -1.0}, {"top_k": 0}, {"top_p": 1.5}, {"top_p": 0.0}):
        with pytest.raises(UserError):
            Sampling(**settings)


def test_a_step_copies_no_cache():
    """Reads the compiled programs: of keys and values only the new token's are moved."""
    B, C, H = 8, 64, 256
    config = dataclasses.replace(tiny(), num_kv_heads=1, head_dim=H, sliding_window=C)
    model = Transformer(config)
    generator = Generator(model, model.init(jax.random.key(0)))
    state = generator.begin([[2, 5]] * B, capacity=C, seeds=range(B), sampling=GREEDY)
    one = np.ones((B, 1), np.int32)
    args = generator.model, generator.params, state
    lowered = (
        programs.feed.lower(args[0], False, *args[1:], one, one),
        programs.draw.lower(args[0], 8, GREEDY, (1,), *args[1:], np.int32(8)),
    )
    whole = re.compile(rf"\[(1,)?{B},{C},(1,)?{H}\]\S* (copy|transpose)\(")
    for program in lowered:
        text = program.compile().as_text()
        assert f"[{B},{C},{H}]" in text
        assert not whole.search(text)
