"""The compiled programs of generation, and the state that they hand on.

Each is compiled for shapes rounded up to powers of two. `decode.py` says what calls them when.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gemma_jax.generation.sampling import Sampling, penalise, sample
from gemma_jax.model.cache import Cache, init_cache
from gemma_jax.model.config import ModelConfig
from gemma_jax.model.matrix import select_rows
from gemma_jax.model.transformer import Transformer, unrolled, unrolled_config
from gemma_jax.ops.hardware import on_gpu, on_tpu
from gemma_jax.sharding import Layout, current_layout, pin

MIN_STEPS = 8


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


def slots(length: int) -> int:
    """The length of a cache, rounded up."""
    return max(_least(32, 512), _power(length))


def width(length: int) -> int:
    """The length of a chunk of a prompt, rounded up."""
    return max(_least(32, 128), _power(length))


def steps(length: int) -> int:
    """The tokens that a program may draw, rounded up; it ends where it is told to."""
    return max(_least(MIN_STEPS, 512), _power(length))


def _least(on_cpu: int, elsewhere: int) -> int:
    """What is padded costs an accelerator less than one compilation more."""
    return elsewhere if on_gpu() or on_tpu() else on_cpu


def _power(length: int) -> int:
    return 1 << (length - 1).bit_length()


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def empty_state(
    config: ModelConfig, length: int, penalised: bool, seeds: Any, done: Any, adapters: Any
) -> State:
    B = seeds.shape[0]
    return State(
        _outside(init_cache(config, B, length)),
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


def _chosen(params: Any, state: State) -> Any:
    return params if state.adapters is None else select_rows(params, state.adapters)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def feed(
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
def choose(
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
def draw(
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

    def one(loop: _Loop) -> _Loop:
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
    loop = jax.lax.while_loop(more, one, _Loop(state, jnp.int32(0), tokens, empty))
    # Every process looks at these.
    state = loop.state._replace(length=pin(loop.state.length), done=pin(loop.state.done))
    return state, pin(loop.tokens), pin(loop.logprobs), loop.step


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
    penalised = sampling.repetition_penalty is not None
    whole = layout.replicated()
    seeds, done = (jax.ShapeDtypeStruct((rows,), t, sharding=whole) for t in (jnp.uint32, bool))
    with layout.active():
        length = min(slots(capacity), model.config.max_seq_len)
        empty = empty_state.lower(model.config, length, penalised, seeds, done, None)
        state = laid_out(empty.out_info, empty.compile().output_shardings)
        limit = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
        return draw.trace(model, MIN_STEPS, sampling, (), params, state, limit), params, state
