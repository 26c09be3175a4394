"""Texts that a model writes by itself, greedily, and whether they are a known answer."""

import string
from collections.abc import Callable, Sequence

from gemma_jax.data.tokenizer import BOS, Tokenizer
from gemma_jax.generation.decode import Generator
from gemma_jax.generation.sampling import Sampling
from gemma_jax.generation.text import write_texts

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
    written = write_texts(
        generator,
        tokenizer,
        ids,
        max_new_tokens=max_new_tokens,
        sampling=sampling or Sampling(temperature=0.0),
        stop=stop,
        batch_tokens=batch_tokens,
        advance=advance,
    )
    return [one.text for one in written]


def matches(text: str, answers: Sequence[str]) -> bool:
    """Whether a text is one of the answers, but for case, punctuation, articles and spaces."""
    return normal(text) in {normal(answer) for answer in answers}


def normal(text: str) -> str:
    """As TriviaQA's own script compares answers."""
    letters = "".join(" " if one in string.punctuation + "‘’´`_" else one for one in text.lower())
    return " ".join(word for word in letters.split() if word not in _ARTICLES)
