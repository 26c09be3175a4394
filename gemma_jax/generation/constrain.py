"""Texts that belong to a grammar: the host says which tokens may follow, the device draws one.

The masks of the next step are computed on the host while the device reads the tokens of this one.
Where the grammar leaves no choice, nothing is drawn: its tokens are read several at a time, or, in
a batch on a CPU, beside the tokens that other rows draw.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax

from gemma_jax.data.tokenizer import Tokenizer
from gemma_jax.errors import PromptError, UserError
from gemma_jax.generation.decode import STRETCH, Generator, check_request
from gemma_jax.generation.grammar import Grammar, GrammarMatcher, GrammarTokenizer, Masks
from gemma_jax.generation.programs import State
from gemma_jax.generation.sampling import Sampling
from gemma_jax.generation.text import STOP_IDS, batches_of

_FREE_TOKENS = 32  # so many take a CPU about as long as one: it waits for the weights

type OnLimit = Literal["close", "cut"]


class BoundCompletion(NamedTuple):
    """A completion under a grammar.

    `logprobs` are the model's own, in nats, None for tokens that it did not draw. `ending` says how
    it came to its end: "complete", "closed" (the limit was near, and a way to an end that fits
    took the place of what does not) or "cut" (by the limit; the text is no whole one).
    """

    text: str
    tokens: list[int]
    logprobs: list[float | None]
    ending: Literal["complete", "closed", "cut"]


class _Row:
    """One text under way."""

    def __init__(self, matcher: GrammarMatcher, number: int, limit: int) -> None:
        self.matcher, self._number, self._limit = matcher, number, limit
        self.logprobs: list[float | None] = []
        self.done = False
        self.take(matcher.forced())

    def take(self, tokens: list[int], logprob: float | None = None) -> None:
        """Takes tokens of which the first has this log-probability."""
        try:
            self.matcher.take(tokens)
        except UserError as error:
            raise PromptError(self._number, str(error)) from None
        self.logprobs += [logprob, *[None] * (len(tokens) - 1)][: len(tokens)]
        self.done = self.matcher.finished or len(self.matcher.tokens) >= self._limit

    def draw(self, token: int, logprob: float) -> list[int]:
        """Takes a token that was drawn and those that are forced after it; gives all of them."""
        if token in STOP_IDS:
            self.done = True
            return []
        before = len(self.matcher.tokens)
        self.take([token], logprob)
        if not self.done:
            self.take(self.matcher.forced())
        return self.matcher.tokens[before:]

    def completion(self, tokenizer: Tokenizer, on_limit: OnLimit) -> BoundCompletion:
        tokens, logprobs = self.matcher.tokens, self.logprobs
        whole = self.matcher.complete and len(tokens) <= self._limit
        ending: Literal["complete", "closed", "cut"] = "complete" if whole else "cut"
        if not whole:
            closed = self.matcher.close(self._limit) if on_limit == "close" else None
            if closed is None:
                tokens = tokens[: self._limit]
            else:
                same = 0
                while same < min(len(closed), len(tokens)) and closed[same] == tokens[same]:
                    same += 1
                tokens, ending = closed, "closed"
                logprobs = [*logprobs[:same], *[None] * (len(closed) - same)]
        return BoundCompletion(tokenizer.decode(tokens), tokens, logprobs[: len(tokens)], ending)


def write_bound_texts(
    generator: Generator,
    tokenizer: Tokenizer,
    pieces: GrammarTokenizer,
    prompts: Sequence[Sequence[int]],
    grammars: Sequence[Grammar],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    seeds: Sequence[int] | None = None,
    on_limit: OnLimit = "close",
    batch_tokens: int = 8192,
    adapters: Sequence[int] | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> list[BoundCompletion]:
    """A completion of each prompt that belongs to its grammar, in their order.

    A prompt's result depends on its ids, its grammar and its seed alone. `advance` is told of
    completions done. Raises UserError where a grammar cannot be obeyed.
    """
    if len(grammars) != len(prompts):
        raise UserError(f"{len(grammars)} grammars for {len(prompts)} prompts; give one a prompt.")
    sampling = sampling or Sampling()
    _, own = check_request(generator.model, prompts, max_new_tokens, seeds)
    made = _matchers(grammars, pieces)
    results: dict[int, BoundCompletion] = {}
    for batch in batches_of(prompts, max_new_tokens, batch_tokens):
        rows = [_Row(made[i], i, max_new_tokens) for i in batch]
        starts = [
            [*prompts[i], *([] if row.done else row.matcher.tokens)]
            for i, row in zip(batch, rows, strict=True)
        ]
        state = generator.begin(
            starts,
            capacity=max(len(prompts[i]) for i in batch) + max_new_tokens,
            seeds=[own[i] for i in batch],
            sampling=sampling,
            adapters=None if adapters is None else [adapters[i] for i in batch],
        )
        _write(generator, pieces.vocab_size, state, rows, sampling)
        for i, row in zip(batch, rows, strict=True):
            results[i] = row.completion(tokenizer, on_limit)
        advance(len(batch))
    return [results[i] for i in range(len(prompts))]


def _matchers(grammars: Sequence[Grammar], pieces: GrammarTokenizer) -> list[GrammarMatcher]:
    made = []
    for number, grammar in enumerate(grammars):
        try:
            made.append(GrammarMatcher(grammar, pieces))
        except UserError as error:
            if all(grammar == one for one in grammars):
                raise
            raise PromptError(number, str(error)) from None
    return made


def _write(
    generator: Generator, vocab_size: int, state: State, rows: list[_Row], sampling: Sampling
) -> None:
    B = state.length.shape[0]
    masks = Masks(B, vocab_size)
    waiting: list[list[int]] = [[] for _ in rows]  # taken, but not read by the model yet

    def drawing() -> dict[int, GrammarMatcher]:
        return {
            number: row.matcher
            for number, row in enumerate(rows)
            if not row.done and not waiting[number]
        }

    allowed = masks.fill(drawing())
    while not all(row.done for row in rows):
        if asked := drawing():
            tokens, logprobs = generator.choose(state, allowed, sampling=sampling)
            for number in asked:
                taken = rows[number].draw(int(tokens[number]), float(logprobs[number]))
                waiting[number] = [] if rows[number].done else taken
        at_once = STRETCH if _is_worth_it(waiting, B) else 1
        fed = [tokens[:at_once] for tokens in waiting]
        waiting = [tokens[at_once:] for tokens in waiting]
        if any(fed):
            state = generator.extend(state, fed)  # runs on the device while the masks are computed
        allowed = masks.fill(drawing())


def _is_worth_it(waiting: list[list[int]], rows: int) -> bool:
    """Whether to read forced tokens together. A CPU computes what is padded, beyond few tokens."""
    useful = sum(len(tokens[:STRETCH]) for tokens in waiting)
    room = rows * STRETCH
    return jax.default_backend() != "cpu" or room <= _FREE_TOKENS or 2 * useful >= room
