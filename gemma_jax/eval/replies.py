"""What a model answers to held-out conversations, and how good that is."""

import contextvars
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gemma_jax.data.chat import encode_chat
from gemma_jax.data.conversations import Conversation
from gemma_jax.data.tokenizer import Tokenizer
from gemma_jax.errors import UserError
from gemma_jax.generation.decode import Generator, check_request
from gemma_jax.generation.sampling import Sampling
from gemma_jax.generation.text import write_texts
from gemma_jax.model.transformer import Transformer
from gemma_jax.tuning.sft import Scorer

EXACT_MATCH = "exact_match"


def make_reply_evaluation(
    model: Transformer,
    tokenizer: Tokenizer,
    conversations: Sequence[Conversation],
    *,
    max_new_tokens: int,
    scorer: Scorer | None = None,
) -> Callable[[Any], dict[str, float]]:
    """`evaluate(params)`: the model speaks the last of its turns in each conversation, greedily.

    Returns `exact_match`, the share of replies equal to that turn (space around both left aside),
    and the means of what `scorer` gives. The scorer is tried on the first conversation at once, so
    that its mistakes show before the training and not after.

    Raises:
      UserError: for prompts that leave no room in the model's context, or a scorer that returns no
        number.
    """
    pairs = [_last_turn(one) for one in conversations]
    prompts = [encode_chat(tokenizer, before, add_generation_prompt=True) for before, _ in pairs]
    check_request(model, prompts, max_new_tokens, None)
    if scorer is not None:
        _scores(scorer, conversations[0], pairs[0][1])

    def evaluate(params: Any) -> dict[str, float]:
        # The rows of a batch may be fewer than the devices that training splits its batches over.
        replies = contextvars.Context().run(
            write_texts,
            Generator(model, params),
            tokenizer,
            prompts,
            max_new_tokens=max_new_tokens,
            sampling=Sampling(temperature=0),
        )
        rows = []
        for one, (_, expected), reply in zip(conversations, pairs, replies, strict=True):
            text = reply.text.strip()
            row = {} if scorer is None else _scores(scorer, one, text)
            rows.append(row | {EXACT_MATCH: float(text == expected)})
        return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}

    return evaluate


def _last_turn(one: Conversation) -> tuple[list[Mapping[str, str]], str]:
    """The messages before the last turn of the model, and its text."""
    messages = one.row["messages"]
    last = max(i for i, message in enumerate(messages) if message["role"] in ("assistant", "model"))
    return messages[:last], messages[last]["content"].strip()


def _scores(scorer: Scorer, one: Conversation, reply: str) -> dict[str, float]:
    given = scorer(one.row, reply)
    named = given if isinstance(given, Mapping) else {"score": given}
    try:
        scores = {str(name): float(value) for name, value in named.items()}
        if not all(map(math.isfinite, scores.values())):
            raise ValueError
    except (TypeError, ValueError):
        raise UserError(
            f"the scorer returns {given!r:.80} for {one.place}; it must return a finite number or "
            "a dict of them."
        ) from None
    return scores
