"""Texts that a model writes by itself, greedily, and whether they are a known answer."""

import string
from collections.abc import Callable, Sequence

import numpy as np

from gemma_jax.data.tokenizer import BOS, END_OF_TURN, EOS, Tokenizer
from gemma_jax.generation.decode import Generator
from gemma_jax.generation.sampling import Sampling

_STRIDE = 8  # steps between two looks at the text
_ARTICLES = ("a", "an", "the")


def write_answers(
    generator: Generator,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    stop: Sequence[str],
    max_new_tokens: int,
    batch_tokens: int = 8192,
    sampling: Sampling | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> list[str]:
    """The continuation of each prompt up to the first of `stop`, greedy unless told otherwise.

    A prompt that leaves no room for an answer in the model's context is cut at its start.
    """
    room = max(generator.model.config.max_seq_len - max_new_tokens, 1)
    ids = [[BOS, *tokenizer.encode(prompt)] for prompt in prompts]
    ids = [one if len(one) <= room else [BOS, *one[len(one) - room + 1 :]] for one in ids]
    texts = [""] * len(ids)
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]), reverse=True)
    while order:
        # A power of two of rows, so that few programs are compiled.
        rows = max(1, batch_tokens // (len(ids[order[0]]) + max_new_tokens))
        batch, order = order[: 1 << (rows.bit_length() - 1)], order[1 << (rows.bit_length() - 1) :]
        stream = generator.stream(
            [ids[i] for i in batch],
            max_new_tokens=max_new_tokens,
            sampling=sampling or Sampling(temperature=0.0),
            seeds=batch,
            stop_ids=(EOS, END_OF_TURN),
            stride=min(_STRIDE, max_new_tokens),
        )
        written: list[list[int]] = [[] for _ in batch]
        ended: list[int] | None = None
        while True:
            try:
                tokens, _ = stream.send(ended)
            except StopIteration:
                break
            for own, row in zip(written, np.asarray(tokens).tolist(), strict=True):
                own += [token for token in row if token >= 0]
            ended = [i for i, own in enumerate(written) if _place(tokenizer.decode(own), stop) >= 0]
        for i, own in zip(batch, written, strict=True):
            text = tokenizer.decode(own)  # control tokens stand for nothing
            place = _place(text, stop)
            texts[i] = text if place < 0 else text[:place]
        advance(len(batch))
    return texts


def matches(text: str, answers: Sequence[str]) -> bool:
    """Whether a text is one of the answers, but for case, punctuation, articles and spaces."""
    return normal(text) in {normal(answer) for answer in answers}


def normal(text: str) -> str:
    """As TriviaQA's own script compares answers."""
    letters = "".join(" " if one in string.punctuation + "‘’´`_" else one for one in text.lower())
    return " ".join(word for word in letters.split() if word not in _ARTICLES)


def _place(text: str, stop: Sequence[str]) -> int:
    """Where the first of `stop` begins, or -1."""
    return min((at for one in stop if (at := text.find(one)) >= 0), default=-1)
