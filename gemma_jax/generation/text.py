"""Texts that a model writes: whole characters at a time, up to a stop string, many in batches."""

import codecs
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from gemma_jax.data.tokenizer import END_OF_TURN, EOS, Tokenizer
from gemma_jax.errors import UserError
from gemma_jax.generation.decode import Generator, check_request
from gemma_jax.generation.sampling import Sampling

STOP_IDS = (EOS, END_OF_TURN)
STRIDE = 8  # steps between two looks at the text
_MOST_ROWS = 256  # of a batch: more are hardly faster, and their logits fill gigabytes


class TextCompletion(NamedTuple):
    """`text` continues the prompt; `tokens` and `logprobs` (nats) are what it was decoded from.

    A stop string is cut off the text, not off the tokens. `stopped` is False where the limit ended
    it.
    """

    text: str
    tokens: list[int]
    logprobs: list[float]
    stopped: bool


class Writer:
    """One completion as it grows: tokens to text, whole characters at a time, up to a stop."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        if any(not text for text in stop):
            raise UserError("a stop string is empty; give some text.")
        self._tokenizer, self._stop = tokenizer, stop
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._tokens: list[int] = []
        self._logprobs: list[float] = []
        self._text, self._given = "", 0
        self.stopped = False

    def add(self, tokens: Sequence[int], logprobs: Sequence[float]) -> str:
        """Takes new tokens (-1 is none) and returns the text that is certain to stay."""
        for token, logprob in zip(tokens, logprobs, strict=True):
            if self.stopped or token < 0:
                break
            if token in STOP_IDS:
                self.stopped = True
                break
            self._tokens.append(int(token))
            self._logprobs.append(float(logprob))
            self._text += self._decoder.decode(self._tokenizer.decode_bytes([int(token)]))
            self._cut()
        # A stop string may have begun at the end of the text.
        held = max((len(text) - 1 for text in self._stop), default=0)
        return self._give(len(self._text) if self.stopped else len(self._text) - held)

    def rest(self) -> str:
        """The text that was held back, at the end."""
        if not self.stopped:
            self._text += self._decoder.decode(b"", final=True)
            self._cut()
        return self._give(len(self._text))

    def result(self) -> TextCompletion:
        self.rest()
        return TextCompletion(self._text, self._tokens, self._logprobs, self.stopped)

    def _cut(self) -> None:
        places = [place for text in self._stop if (place := self._text.find(text)) >= 0]
        if places:
            self._text, self.stopped = self._text[: min(places)], True

    def _give(self, end: int) -> str:
        piece = self._text[self._given : end]
        self._given = max(self._given, end)
        return piece


def batches_of(
    prompts: Sequence[Sequence[int]], max_new_tokens: int, batch_tokens: int
) -> Iterator[list[int]]:
    """The indices of prompts of like lengths, as many as `batch_tokens` has room for."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    while order:
        # A power of two of rows, so that few programs are compiled.
        rows = max(1, batch_tokens // (len(prompts[order[0]]) + max_new_tokens))
        rows = min(rows, _MOST_ROWS)
        rows = 1 << (rows.bit_length() - 1)
        yield order[:rows]
        order = order[rows:]


def write_texts(
    generator: Generator,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    seeds: Sequence[int] | None = None,
    stop: Sequence[str] = (),
    batch_tokens: int = 8192,
    adapters: Sequence[int] | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> list[TextCompletion]:
    """The completion of each prompt, in their order.

    A prompt's result depends on its ids and its seed (0, 1, ... by default) alone. `stop` are texts
    that end a completion. `batch_tokens` bounds prompts and completions of a batch together.
    `adapters` are numbers, one a prompt, where the generator holds several.
    """
    _, own = check_request(generator.model, prompts, max_new_tokens, seeds)
    results: list[TextCompletion | None] = [None] * len(prompts)
    for batch in batches_of(prompts, max_new_tokens, batch_tokens):
        writers = [Writer(tokenizer, stop) for _ in batch]
        stream = generator.stream(
            [prompts[i] for i in batch],
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            seeds=[own[i] for i in batch],
            stop_ids=STOP_IDS,
            stride=STRIDE if stop else max_new_tokens,
            adapters=None if adapters is None else [adapters[i] for i in batch],
        )
        ended: list[int] | None = None
        while True:
            try:
                tokens, logprobs = stream.send(ended)
            except StopIteration:
                break
            for writer, *row in zip(writers, tokens, logprobs, strict=True):
                writer.add(*row)
            ended = [i for i, writer in enumerate(writers) if writer.stopped]
        for i, writer in zip(batch, writers, strict=True):
            results[i] = writer.result()
        advance(len(batch))
    return [result for result in results if result is not None]
