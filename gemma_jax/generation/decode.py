"""Batched generation with the ring-buffer cache: prompts in chunks, then one token a step.

Programs are compiled for shapes rounded up to powers of two (rows, cache length, chunk), so a new
prompt seldom compiles anything. A row's tokens depend on its prompt and its seed alone.
"""

import functools
from collections import abc
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gemma_jax.errors import UserError
from gemma_jax.generation.sampling import Sampling, penalise, sample
from gemma_jax.model.cache import Cache, init_cache
from gemma_jax.model.config import ModelConfig
from gemma_jax.model.matrix import select_rows
from gemma_jax.model.transformer import Transformer, unrolled, unrolled_config
from gemma_jax.sharding import Layout, active, current_layout, pin

_MIN_BUCKET = 32
_MIN_STEPS = 8
STRETCH = 8  # tokens that are no prompt yet, read at once
_CHUNK = 512  # prompt tokens at once: bounds the memory of a long prompt's attention scores


class Completion(NamedTuple):
    """What was generated after one prompt: without the token that ended it.

    `logprobs` are the model's own log-probabilities of `tokens` in nats, before temperature and
    filters. `stopped` is False where `max_new_tokens` ended it.
    """

    tokens: list[int]
    logprobs: list[float]
    stopped: bool


class State(NamedTuple):
    """Sequences under way, on the device. B rows.

    `cache` is as programs hand it on (`_outside`). `hidden` is the state after the last token that
    each row was fed, from which the next is drawn; `length` counts those tokens. `seen` marks the
    tokens of each row for the repetition penalty.
    """

    cache: Cache
    hidden: Any  # [B, D]
    length: Any  # int32 [B]
    done: Any  # bool [B]
    keys: Any  # [B]
    seen: Any  # bool [B, V], or None
    adapters: Any = None  # int32 [B]: which variant of its matrices each row asks for, or None


class Generator:
    """A model ready to generate. Holds its weights in the order of the layers.

    With `layout` (the active one by default) the work is split over its devices, with `params` laid
    out by it. What its rules split over the batch axes is gathered for every token: models too
    large for a device are better split over `tensor`.
    """

    def __init__(self, model: Transformer, params: Any, layout: Layout | None = None) -> None:
        self.model, self.params = unrolled(model, params)
        self._layout = layout or current_layout()

    def begin(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        capacity: int,
        seeds: Sequence[int],
        sampling: Sampling,
        adapters: Sequence[int] | None = None,
    ) -> State:
        """Reads the prompts into a fresh cache of at least `capacity` tokens.

        `adapters` are numbers, one a prompt, where the parameters hold several of them.
        """
        B = 1 << (len(prompts) - 1).bit_length()
        config = self.model.config
        lengths = np.zeros(B, np.int32)
        lengths[: len(prompts)] = [len(prompt) for prompt in prompts]
        all_seeds = np.array(_filled(seeds, B), np.uint32)
        slots = min(_bucket(capacity), config.max_seq_len)
        penalised = sampling.repetition_penalty is not None
        own = None if adapters is None else np.array(_filled(adapters, B), np.int32)
        with active(self._layout):
            state = _empty(config, slots, penalised, all_seeds, lengths == 0, own)
        return self.extend(state, prompts)

    def extend(self, state: State, prompts: Sequence[Sequence[int]]) -> State:
        """Feeds further tokens to each row (none to some); the cache must have room for them."""
        B = state.length.shape[0]
        rows = [*prompts, *[()] * (B - len(prompts))]
        longest = max(map(len, rows))
        for start in range(0, longest, _CHUNK):
            width = _width(min(_CHUNK, longest - start))
            tokens, valid = np.zeros((B, width), np.int32), np.zeros((B, width), np.int32)
            for i, row in enumerate(rows):
                part = row[start : start + width]
                tokens[i, : len(part)], valid[i, : len(part)] = part, 1
            # Only a fresh cache holds nothing; then the tokens see each other alone.
            fresh = start == 0 and not np.asarray(state.length).any()
            with active(self._layout):
                state = _feed(self.model, fresh, self.params, state, tokens, valid)
        return state

    def choose(
        self, state: State, allowed: np.ndarray, *, sampling: Sampling
    ) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, logprobs) [B] drawn from those allowed; the state stays as it is.

        `allowed` is uint32 [B, V / 32], rounded up: bit j of word i stands for token 32 i + j.
        """
        with active(self._layout):
            token, logprob = _choose(self.model, sampling, self.params, state, allowed)
        return np.asarray(token), np.asarray(logprob)

    def advance(
        self, state: State, steps: int, *, sampling: Sampling, stop_ids: Sequence[int]
    ) -> tuple[State, np.ndarray, np.ndarray]:
        """Draws up to `steps` tokens a row: (state, tokens [B, n], logprobs [B, n]).

        A row that has drawn one of `stop_ids` is done and keeps drawing nothing; its further
        entries are -1. n < steps where all rows are done.
        """
        size = max(_MIN_STEPS, 1 << (steps - 1).bit_length())
        ids = tuple(stop_ids)
        with active(self._layout):
            state, tokens, logprobs, n = _draw(
                self.model, size, sampling, ids, self.params, state, np.int32(steps)
            )
        return state, np.asarray(tokens)[:, : int(n)], np.asarray(logprobs)[:, : int(n)]

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        seeds: Sequence[int] | None = None,
        stop_ids: Sequence[int] = (),
        stride: int = 8,
        adapters: Sequence[int] | None = None,
    ) -> abc.Generator[tuple[np.ndarray, np.ndarray], list[int] | None]:
        """(tokens, logprobs) [B, n] as they come, `stride` steps at a time; -1 in rows done.

        Send it the indices of rows to end early, as `stop strings` do.
        """
        sampling = sampling or Sampling()
        longest, own = check_request(self.model, prompts, max_new_tokens, seeds)
        state = self.begin(
            prompts,
            capacity=longest + max_new_tokens,
            seeds=own,
            sampling=sampling,
            adapters=adapters,
        )
        left = max_new_tokens
        # Who takes parts wants the first token at once; the program is that of a whole stride.
        steps = 1 if stride < max_new_tokens else max_new_tokens
        while left > 0:
            state, tokens, logprobs = self.advance(
                state, steps, sampling=sampling, stop_ids=stop_ids
            )
            ended = yield tokens[: len(prompts)], logprobs[: len(prompts)]
            if ended:
                state = state._replace(done=state.done.at[jnp.asarray(ended)].set(True))
            if np.asarray(state.done).all():
                return
            left -= steps
            steps = min(stride, left)


def generate(
    model: Transformer,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    seeds: Sequence[int] | None = None,
    stop_ids: Sequence[int] = (),
) -> list[Completion]:
    """A completion of each prompt, up to and without the first of `stop_ids`.

    Prompts of different lengths share a batch. `seeds` are one a prompt, 0, 1, ... by default.
    Raises UserError for an empty prompt, or for one that leaves the model's context.
    """
    check_request(model, prompts, max_new_tokens, seeds)
    parts = list(
        Generator(model, params).stream(
            prompts,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            seeds=seeds,
            stop_ids=stop_ids,
            stride=max_new_tokens,
        )
    )
    tokens = np.concatenate([part[0] for part in parts], axis=1)
    logprobs = np.concatenate([part[1] for part in parts], axis=1)
    return [completion(*row, stop_ids) for row in zip(tokens, logprobs, strict=True)]


def trace_advance(
    model: Transformer, layout: Layout, *, rows: int, capacity: int, sampling: Sampling
) -> tuple[Any, Any, State]:
    """`Generator.advance` of sequences in caches of `capacity` tokens, as a program that is not
    compiled yet, and the parameters and the state that it takes, as shapes that say where they
    live: the state where the program that makes an empty one leaves it."""

    def laid_out(shapes: Any, shardings: Any) -> Any:
        return jax.tree.map(
            lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
            shapes,
            shardings,
        )

    shapes = jax.eval_shape(lambda params: unrolled(model, params)[1], model.shapes())
    model = Transformer(unrolled_config(model.config))
    params = laid_out(shapes, layout.shardings(model.axes(), shapes))
    slots = min(_bucket(capacity), model.config.max_seq_len)
    penalised = sampling.repetition_penalty is not None
    whole = layout.replicated()
    seeds, done = (jax.ShapeDtypeStruct((rows,), t, sharding=whole) for t in (jnp.uint32, bool))
    with layout.active():
        empty = _empty.lower(model.config, slots, penalised, seeds, done, None)
        state = laid_out(empty.out_info, empty.compile().output_shardings)
        limit = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
        return _draw.trace(model, _MIN_STEPS, sampling, (), params, state, limit), params, state


def completion(tokens: np.ndarray, logprobs: np.ndarray, stop_ids: Sequence[int]) -> Completion:
    """One row of a stream as a completion."""
    real = tokens[tokens >= 0].tolist()
    stopped = bool(real) and real[-1] in stop_ids
    kept = real[:-1] if stopped else real
    return Completion(kept, logprobs[: len(kept)].tolist(), stopped)


def check_request(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    seeds: Sequence[int] | None,
) -> tuple[int, list[int]]:
    """(length of the longest prompt, a seed a prompt), or a refusal before any work."""
    if not prompts or any(len(prompt) == 0 for prompt in prompts):
        raise UserError("a prompt is empty; give at least the beginning-of-text token.")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens={max_new_tokens} must be at least 1.")
    longest, context = max(map(len, prompts)), model.config.max_seq_len
    if longest + max_new_tokens > context:
        raise UserError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones leave the model's context "
            f"of {context} tokens; shorten one of them."
        )
    own = list(range(len(prompts)) if seeds is None else seeds)
    if len(own) != len(prompts):
        raise UserError(f"{len(own)} seeds for {len(prompts)} prompts; give one a prompt.")
    return longest, own


def _width(tokens: int) -> int:
    """One token, or a few that a grammar forces, are no prompt."""
    return tokens if tokens == 1 else STRETCH if tokens <= STRETCH else _bucket(tokens)


def _bucket(length: int) -> int:
    return max(_MIN_BUCKET, 1 << (length - 1).bit_length())


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _empty(
    config: ModelConfig, slots: int, penalised: bool, seeds: Any, done: Any, adapters: Any
) -> State:
    B = seeds.shape[0]
    return State(
        _outside(init_cache(config, B, slots)),
        jnp.zeros((B, config.embed_dim), config.compute_dtype),
        pin(jnp.zeros(B, jnp.int32)),
        pin(done),
        jax.vmap(jax.random.key)(seeds),
        jnp.zeros((B, config.vocab_size), bool) if penalised else None,
        adapters,
    )


def _outside(cache: Cache) -> Cache:
    """The cache of unrolled layers as [B, C, K * H] and [B, C]: without the dimension of the one
    period, and that of the one kv head.

    XLA for CPUs may lay dimensions of one out in any order, chooses another one inside of a step
    than at its ends, and copies all of the cache on the way in and out. Over devices, by whose axes
    these dimensions may be split, the cache stays as it is.
    """
    if current_layout() is not None:
        return cache
    return jax.tree.map(lambda x: x.reshape(*x.shape[1:3], *((-1,) if x.ndim > 3 else ())), cache)


def _inside(config: ModelConfig, cache: Cache) -> Cache:
    """The same as the model takes it."""
    if current_layout() is not None:
        return cache
    heads = config.num_kv_heads, config.head_dim
    return jax.tree.map(lambda x: x.reshape(1, *x.shape[:2], *(heads if x.ndim > 2 else ())), cache)


def _filled(values: Sequence[int], rows: int) -> list[int]:
    return [*values, *[0] * (rows - len(values))]


def _chosen(params: Any, state: State) -> Any:
    return params if state.adapters is None else select_rows(params, state.adapters)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _feed(
    model: Transformer, fresh: bool, params: Any, state: State, tokens: Any, valid: Any
) -> State:
    B, T = tokens.shape
    params = _chosen(params, state)
    places = state.length[:, None] + jnp.arange(T, dtype=jnp.int32)
    cache = _inside(model.config, state.cache)
    hidden, cache = model.extend(params, tokens, places, valid, cache, fresh=fresh)
    count = valid.sum(axis=1, dtype=jnp.int32)
    last = jnp.take_along_axis(hidden, jnp.maximum(count - 1, 0)[:, None, None], axis=1)[:, 0]
    seen = state.seen
    if seen is not None:
        rows = jnp.arange(B, dtype=jnp.int32)[:, None]
        seen = seen.at[rows, tokens].max(valid > 0)
    return state._replace(
        cache=_outside(cache),
        hidden=jnp.where((count > 0)[:, None], last, state.hidden),
        length=pin(state.length + count),
        seen=seen,
    )


def _next(
    model: Transformer, sampling: Sampling, params: Any, state: State, allowed: Any = None
) -> tuple[Any, Any]:
    """The next token of each row [B] and its log-probability."""
    logits = model.logits(params, state.hidden)
    keys = jax.vmap(jax.random.fold_in)(state.keys, state.length)
    scores = logits
    if state.seen is not None and sampling.repetition_penalty is not None:
        scores = penalise(logits, state.seen, sampling.repetition_penalty)
    if allowed is not None:
        scores = jnp.where(allowed, scores, -jnp.inf)
    token = sample(scores, keys, sampling)
    rows = jnp.arange(token.shape[0], dtype=jnp.int32)
    return token, logits[rows, token] - jax.nn.logsumexp(logits, axis=-1)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _choose(
    model: Transformer, sampling: Sampling, params: Any, state: State, allowed: Any
) -> tuple[Any, Any]:
    bits = allowed[:, :, None] >> jnp.arange(32, dtype=jnp.uint32) & 1
    mask = bits.reshape(bits.shape[0], -1)[:, : model.config.vocab_size] > 0
    return _next(model, sampling, params, state, mask)


class _Loop(NamedTuple):
    state: State
    step: Any
    tokens: Any  # [B, size]
    logprobs: Any  # [B, size]


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), donate_argnums=5)
def _draw(
    model: Transformer,
    size: int,
    sampling: Sampling,
    stop_ids: tuple[int, ...],
    params: Any,
    state: State,
    limit: Any,
) -> tuple[State, Any, Any, Any]:
    B = state.length.shape[0]
    params = _chosen(params, state)
    stops = jnp.asarray(stop_ids or (-1,), jnp.int32)
    rows = jnp.arange(B, dtype=jnp.int32)

    def more(loop: _Loop) -> Any:
        return (loop.step < limit) & ~loop.state.done.all()

    def draw(loop: _Loop) -> _Loop:
        state = loop.state
        token, logprob = _next(model, sampling, params, state)
        going = ~state.done
        valid = going.astype(jnp.int32)
        cache = _inside(model.config, state.cache)
        hidden, cache = model.extend(
            params, token[:, None], state.length[:, None], valid[:, None], cache
        )
        seen = state.seen if state.seen is None else state.seen.at[rows, token].max(going)
        state = State(
            _outside(cache),
            jnp.where(going[:, None], hidden[:, 0], state.hidden),
            state.length + valid,
            state.done | (token[:, None] == stops).any(-1),
            state.keys,
            seen,
            state.adapters,
        )
        return _Loop(
            state,
            loop.step + 1,
            loop.tokens.at[:, loop.step].set(jnp.where(going, token, -1)),
            loop.logprobs.at[:, loop.step].set(jnp.where(going, logprob, 0)),
        )

    tokens = jnp.full((B, size), -1, jnp.int32)
    empty = jnp.zeros((B, size), jnp.float32)
    loop = jax.lax.while_loop(more, draw, _Loop(state, jnp.int32(0), tokens, empty))
    # Every process looks at these.
    state = loop.state._replace(length=pin(loop.state.length), done=pin(loop.state.done))
    return state, pin(loop.tokens), pin(loop.logprobs), loop.step
