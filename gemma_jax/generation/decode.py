"""Batched generation with the ring-buffer cache: prompts in chunks, then one token a step.

Programs are compiled for shapes rounded up to powers of two (rows, cache length, chunk), so a new
prompt seldom compiles anything. A row's tokens depend on its prompt and its seed alone.
"""

from collections import abc
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from gemma_jax.errors import PromptError, UserError
from gemma_jax.generation import programs
from gemma_jax.generation.programs import State
from gemma_jax.generation.sampling import Sampling
from gemma_jax.model.transformer import Transformer, unrolled
from gemma_jax.sharding import Layout, active, current_layout

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
        slots = min(programs.slots(capacity), config.max_seq_len)
        penalised = sampling.repetition_penalty is not None
        own = None if adapters is None else np.array(_filled(adapters, B), np.int32)
        with active(self._layout):
            state = programs.empty_state(config, slots, penalised, all_seeds, lengths == 0, own)
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
                state = programs.feed(self.model, fresh, self.params, state, tokens, valid)
        return state

    def choose(
        self, state: State, allowed: np.ndarray, *, sampling: Sampling
    ) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, logprobs) [B] drawn from those allowed; the state stays as it is.

        `allowed` is uint32 [B, V / 32], rounded up: bit j of word i stands for token 32 i + j.
        """
        with active(self._layout):
            token, logprob = programs.choose(self.model, sampling, self.params, state, allowed)
        return np.asarray(token), np.asarray(logprob)

    def advance(
        self, state: State, steps: int, *, sampling: Sampling, stop_ids: Sequence[int]
    ) -> tuple[State, np.ndarray, np.ndarray]:
        """Draws up to `steps` tokens a row: (state, tokens [B, n], logprobs [B, n]).

        A row that has drawn one of `stop_ids` is done and keeps drawing nothing; its further
        entries are -1. n < steps where all rows are done.
        """
        size = programs.steps(steps)
        ids = tuple(stop_ids)
        with active(self._layout):
            state, tokens, logprobs, n = programs.draw(
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
    context = model.config.max_seq_len
    for number, prompt in enumerate(prompts):
        if len(prompt) + max_new_tokens > context:
            raise PromptError(
                number,
                f"a prompt of {len(prompt)} tokens and {max_new_tokens} new ones leave the model's "
                f"context of {context} tokens; shorten one of them.",
            )
    own = list(range(len(prompts)) if seeds is None else seeds)
    if len(own) != len(prompts):
        raise UserError(f"{len(own)} seeds for {len(prompts)} prompts; give one a prompt.")
    return max(map(len, prompts)), own


def _width(tokens: int) -> int:
    """One token, or a few that a grammar forces, are no prompt."""
    return tokens if tokens == 1 else STRETCH if tokens <= STRETCH else programs.width(tokens)


def _filled(values: Sequence[int], rows: int) -> list[int]:
    return [*values, *[0] * (rows - len(values))]
