"""Log-likelihoods of continuations, what their contexts share being computed once.

Three levels: tokens that all contexts begin with (the examples of a few-shot task) are read once
for all, each context once for its continuations, and each continuation for itself. Shapes are
rounded up to powers of two, so few programs are compiled.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gemma_jax.errors import UserError
from gemma_jax.model.cache import begin_with, init_cache, repeat_rows
from gemma_jax.model.transformer import Transformer
from gemma_jax.ops.vocab_loss import vocab_loss
from gemma_jax.sharding import pin

_MIN_SHARED = 32  # tokens in common below which a second program is not worth it
_MIN_BUCKET = 16
_SHARED_BUCKET = 256
# A program is worth compiling if it saves so many tokens of padding: it takes some seconds, in
# which a CPU reads thousands of tokens of a 270M model and an accelerator millions.
_PROGRAM_TOKENS, _PROGRAM_TOKENS_ACCELERATOR = 2_000, 2_000_000


@dataclass(frozen=True)
class Request:
    """The ids of a context (at least one, BOS as a rule) and of what may follow it."""

    context: Sequence[int]
    continuations: Sequence[Sequence[int]]


class Likelihood(NamedTuple):
    """Sum of the log-probabilities in nats, and whether each token was the likeliest."""

    logprob: float
    greedy: bool


def likelihoods(
    model: Transformer,
    params: Any,
    requests: Sequence[Request],
    *,
    batch_tokens: int = 8192,
    advance: Callable[[int], None] = lambda _: None,
) -> list[list[Likelihood]]:
    """The likelihood of each continuation after its context, in the order of the requests.

    `batch_tokens` bounds contexts and continuations of a batch together. `advance` is told of each
    request done.
    """
    for number, request in enumerate(requests):
        _check(model, number, request)
    shared = _shared([request.context for request in requests])
    results: list[list[Likelihood]] = [[] for _ in requests]
    start = _read_shared(model, params, requests[0].context[:shared]) if shared else None
    # Rounded too: tasks of like lengths (the subjects of one set) then share their programs.
    room = max(_SHARED_BUCKET, _bucket(shared)) if shared else 0
    for batch, rows, shape in _batches(requests, shared, batch_tokens):
        length = room + shape.context + shape.continuation
        arrays = _arrays(requests, batch, shared, rows, shape)
        scores = _score(model, length, params, start, *arrays)
        logprobs, greedy = jax.device_get(scores)
        for row, number in enumerate(batch):
            first = row * shape.choices
            count = len(requests[number].continuations)
            results[number] = [
                Likelihood(float(logprobs[i]), bool(greedy[i])) for i in range(first, first + count)
            ]
            advance(1)
    return results


class _Shape(NamedTuple):
    """Tokens of a context, continuations of each, tokens of those."""

    context: int
    choices: int
    continuation: int

    @property
    def tokens(self) -> int:
        return self.context + self.choices * self.continuation

    def around(self, other: "_Shape") -> "_Shape":
        return _Shape(*map(max, self, other))


def _check(model: Transformer, number: int, request: Request) -> None:
    longest = max((len(c) for c in request.continuations), default=0)
    if not request.context or not request.continuations or not all(request.continuations):
        raise UserError(f"request {number} has an empty context or continuation.")
    if len(request.context) + longest > model.config.max_seq_len:
        raise UserError(
            f"request {number} has {len(request.context)} + {longest} tokens, over the model's "
            f"context of {model.config.max_seq_len}; leave out examples."
        )


def _shared(contexts: Sequence[Sequence[int]]) -> int:
    """How many tokens all contexts begin with, leaving at least one to each; 0 if few."""
    if len(contexts) < 2:
        return 0
    # All others agree where the first and the last in order do.
    first, last = min(map(tuple, contexts)), max(map(tuple, contexts))
    n = 0
    while n < min(len(first), len(last)) - 1 and first[n] == last[n]:
        n += 1
    n = min(n, min(map(len, contexts)) - 1)
    return n if n >= _MIN_SHARED else 0


def _batches(
    requests: Sequence[Request], shared: int, batch_tokens: int
) -> Iterator[tuple[list[int], int, _Shape]]:
    """(requests, rows, shape): like ones together, long ones first, as what cannot fit shows then.

    All batches of a shape have the same rows, the last one too: a shape is one program.
    """
    classes: dict[_Shape, list[int]] = {}
    for number, request in enumerate(requests):
        shape = _Shape(
            _bucket(len(request.context) - shared),
            1 << (len(request.continuations) - 1).bit_length(),
            _bucket(max(map(len, request.continuations))),
        )
        classes.setdefault(shape, []).append(number)
    for shape, numbers in sorted(_merged(classes).items(), reverse=True):
        most = max(1, batch_tokens // shape.tokens)
        rows = 1 << (min(most, len(numbers)).bit_length() - 1)
        if rows < len(numbers) <= most:
            rows *= 2
        for start in range(0, len(numbers), rows):
            yield numbers[start : start + rows], rows, shape


def _merged(classes: dict[_Shape, list[int]]) -> dict[_Shape, list[int]]:
    """Fewer classes: padding requests to another's shape is often cheaper than a program more."""
    worth = _PROGRAM_TOKENS if jax.default_backend() == "cpu" else _PROGRAM_TOKENS_ACCELERATOR
    classes = dict(classes)
    while len(classes) > 1:
        price, a, b = min(
            (
                sum(len(classes[x]) * (a.around(b).tokens - x.tokens) for x in (a, b)),
                a,
                b,
            )
            for a, b in itertools.combinations(sorted(classes), 2)
        )
        if price > worth:
            break
        together = classes.pop(a) + classes.pop(b)
        whole = a.around(b)
        classes[whole] = sorted(classes.get(whole, []) + together)
    return classes


def _bucket(length: int) -> int:
    return max(_MIN_BUCKET, 1 << (length - 1).bit_length())


def _arrays(
    requests: Sequence[Request], batch: list[int], shared: int, rows: int, shape: _Shape
) -> tuple[np.ndarray, ...]:
    """Context ids [B, T] and lengths [B], continuation ids [B * n, C] and lengths [B * n]."""
    contexts = np.zeros((rows, shape.context), np.int32)
    lengths = np.ones(rows, np.int32)
    choices = np.zeros((rows * shape.choices, shape.continuation), np.int32)
    sizes = np.zeros(rows * shape.choices, np.int32)
    for row, number in enumerate(batch):
        own = requests[number].context[shared:]
        contexts[row, : len(own)], lengths[row] = own, len(own)
        for i, continuation in enumerate(requests[number].continuations):
            at = row * shape.choices + i
            choices[at, : len(continuation)], sizes[at] = continuation, len(continuation)
    return contexts, lengths, choices, sizes


@functools.partial(jax.jit, static_argnums=0)
def _read(model: Transformer, params: Any, tokens: Any, length: Any) -> Any:
    T = tokens.shape[1]
    positions = jnp.arange(T, dtype=jnp.int32)[None]
    valid = (positions < length).astype(jnp.int32)
    cache = init_cache(model.config, 1, T)
    _, cache = model.extend(params, tokens, positions, valid, cache, fresh=True)
    return cache


def _read_shared(model: Transformer, params: Any, tokens: Sequence[int]) -> Any:
    """A cache of one row that holds `tokens`, and how many these are."""
    padded = np.zeros((1, _bucket(len(tokens))), np.int32)
    padded[0, : len(tokens)] = tokens
    count = np.int32(len(tokens))
    return _read(model, params, padded, count), count


@functools.partial(jax.jit, static_argnums=(0, 1))
def _score(
    model: Transformer,
    length: int,
    params: Any,
    start: Any,
    contexts: Any,
    lengths: Any,
    choices: Any,
    sizes: Any,
) -> tuple[Any, Any]:
    """(log-probabilities, greedy) [B * n]; `start` is a cache that all contexts go on from."""
    B, T = contexts.shape
    C = choices.shape[1]
    count = choices.shape[0] // B
    cache, offset = init_cache(model.config, B, length), jnp.int32(0)
    if start is not None:
        cache, offset = begin_with(cache, start[0]), start[1]
    steps = jnp.arange(T, dtype=jnp.int32)[None]
    valid = (steps < lengths[:, None]).astype(jnp.int32)
    places = jnp.broadcast_to(steps + offset, (B, T))
    hidden, cache = model.extend(params, contexts, places, valid, cache, fresh=start is None)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)

    steps = jnp.arange(C, dtype=jnp.int32)[None]
    inside = steps < sizes[:, None]
    # The last token of a continuation is scored, never read.
    places = jnp.repeat(lengths + offset, count)[:, None] + steps[:, :-1]
    read = (steps[:, :-1] < sizes[:, None] - 1).astype(jnp.int32)
    after, _ = model.extend(params, choices[:, :-1], places, read, repeat_rows(cache, count))
    states = jnp.concatenate([jnp.repeat(last, count, axis=0), after], axis=1)
    _, stats = vocab_loss(
        states,
        model.output_embedding(params),
        choices[..., None],
        jnp.zeros((*choices.shape, 1), jnp.float32),
        softcap=model.config.final_softcap,
    )
    logit = stats.target_logits[..., 0]
    logprobs = jnp.where(inside, logit - stats.lse, 0).sum(axis=1)
    greedy = ((logit >= stats.max_logit) | ~inside).all(axis=1)
    return pin(logprobs), pin(greedy)  # every process looks at them
