"""Batched generation: one prefill, then one token a step, with the ring-buffer cache."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gemma_jax.errors import UserError
from gemma_jax.generation.sampling import Sampling, sample
from gemma_jax.model.cache import Cache, init_cache
from gemma_jax.model.transformer import Transformer

_MIN_BUCKET = 32


def generate(
    model: Transformer,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    seed: int = 0,
    stop_ids: Sequence[int] = (),
) -> list[list[int]]:
    """The new tokens of each prompt, up to and without the first of `stop_ids`.

    Prompts of different lengths share a batch, and a sequence's result does not depend on the
    others. Lengths are rounded up to powers of two, so few programs are compiled. Raises UserError
    for an empty prompt, or for one that leaves the model's context.
    """
    longest = _longest(model, prompts, max_new_tokens)
    width = _bucket(longest)
    tokens = np.zeros((len(prompts), width), np.int32)
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    keys = jax.vmap(jax.random.fold_in, (None, 0))(
        jax.random.key(seed), jnp.arange(len(prompts), dtype=jnp.int32)
    )
    new = _generate(
        model,
        _bucket(max_new_tokens),
        sampling or Sampling(),
        tuple(stop_ids),
        params,
        tokens,
        lengths,
        keys,
        jnp.int32(max_new_tokens),
    )
    return [_until_stop(row[:max_new_tokens].tolist(), stop_ids) for row in np.asarray(new)]


def _longest(model: Transformer, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> int:
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
    return longest


def _bucket(length: int) -> int:
    return max(_MIN_BUCKET, 1 << (length - 1).bit_length())


def _until_stop(tokens: list[int], stop_ids: Sequence[int]) -> list[int]:
    stops = [i for i, token in enumerate(tokens) if token in stop_ids]
    return tokens[: stops[0]] if stops else tokens


class _Carry(NamedTuple):
    step: jax.Array
    last: jax.Array  # [B] the token to feed next
    done: jax.Array  # [B]
    out: jax.Array  # [B, steps]
    cache: Cache


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _generate(
    model: Transformer,
    steps: int,
    sampling: Sampling,
    stop_ids: tuple[int, ...],
    params: Any,
    tokens: jax.Array,
    lengths: jax.Array,
    keys: jax.Array,
    limit: jax.Array,
) -> jax.Array:
    B, T = tokens.shape
    cache = init_cache(model.config, B, T + steps)
    stops = jnp.asarray(stop_ids or (-1,), jnp.int32)

    def pick(hidden: jax.Array, step: jax.Array) -> jax.Array:
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, step)
        return sample(model.logits(params, hidden), step_keys, sampling)

    positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    real = (positions < lengths[:, None]).astype(jnp.int32)
    hidden, cache = model.extend(params, tokens, positions, real, cache)
    last_hidden = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    first = pick(last_hidden, jnp.int32(0))
    out = jnp.zeros((B, steps), jnp.int32).at[:, 0].set(first)

    def more(carry: _Carry) -> jax.Array:
        return (carry.step < limit) & ~carry.done.all()

    def step(carry: _Carry) -> _Carry:
        place = (lengths + carry.step - 1)[:, None]
        hidden, cache = model.extend(params, carry.last[:, None], place, None, carry.cache)
        token = pick(hidden[:, 0], carry.step)
        out = carry.out.at[:, carry.step].set(token)
        done = carry.done | (token[:, None] == stops).any(-1)
        return _Carry(carry.step + 1, token, done, out, cache)

    done = (first[:, None] == stops).any(-1)
    return jax.lax.while_loop(more, step, _Carry(jnp.int32(1), first, done, out, cache)).out
