"""What a model answers to held-out conversations, and how good that is.

A scorer is handed a line of the file and the reply. What it gives are values, whose mean over the
replies is reported, or pairs (total, weight), of which the ratio of the sums is: so precision,
recall and F1 are those of the whole set, and no means over single replies.
"""

import contextvars
import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from gemma_jax.data.chat import encode_chat
from gemma_jax.data.conversations import Conversation
from gemma_jax.data.line_encoder import LineEncoder
from gemma_jax.data.tokenizer import BOS, Tokenizer
from gemma_jax.errors import PromptError, UserError
from gemma_jax.generation.decode import Generator, check_request
from gemma_jax.generation.sampling import Sampling
from gemma_jax.generation.text import write_texts
from gemma_jax.model.transformer import Transformer
from gemma_jax.tuning.sft import Scorer

EXACT_MATCH = "exact_match"
TEXT_END = "\n\n"  # between two examples of a prompt that is plain text

type PromptFormat = Literal["chat", "text"]
type Scores = dict[str, tuple[float, float]]  # (total, weight) by metric
type Messages = Sequence[Mapping[str, str]]


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
    and what `scorer` gives. The scorer is tried on the first conversation at once, so that its
    mistakes show before the training and not after.

    Raises:
      UserError: for prompts that leave no room in the model's context, or a scorer that returns no
        number.
    """
    prompts = encode_prompts(tokenizer, conversations)
    check_prompts(model, prompts, conversations, max_new_tokens)
    score_reply(scorer, conversations[0], last_turn(conversations[0])[1])

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
        pairs = zip(conversations, replies, strict=True)
        rows = [score_reply(scorer, one, reply.text) for one, reply in pairs]
        return {name: found["value"] for name, found in totals(rows).items()}

    return evaluate


def check_prompts(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    conversations: Sequence[Conversation],
    max_new_tokens: int,
) -> None:
    """Refuses prompts that leave no room in the model's context, with the line of the first."""
    try:
        check_request(model, prompts, max_new_tokens, None)
    except PromptError as error:
        raise UserError(f"{conversations[error.number].place}: {error.reason}") from None


def encode_prompts(
    tokenizer: Tokenizer,
    conversations: Sequence[Conversation],
    *,
    shots: Sequence[Conversation] = (),
    prompt_format: PromptFormat = "chat",
) -> list[list[int]]:
    """The ids of each conversation up to the last turn of the model, after those of `shots`.

    As a chat the shots are earlier turns; as plain text, which a model that was never tuned knows
    better, each message ends with a newline and each example with an empty line.
    """
    if prompt_format == "chat":
        before = [message for one in shots for message in _whole(one)]
        return [
            encode_chat(
                tokenizer, [*before, *_begun(last_turn(one)[0], one)], add_generation_prompt=True
            )
            for one in conversations
        ]
    encoder = LineEncoder(tokenizer)
    start = "".join(_as_text(_whole(one)).removesuffix("\n") + TEXT_END for one in shots)
    return [
        [BOS, *encoder.encode(start + _as_text(_begun(last_turn(one)[0], one)))]
        for one in conversations
    ]


def last_turn(one: Conversation) -> tuple[Messages, str]:
    """The messages before the last turn of the model, and its text."""
    messages = one.row["messages"]
    last = max(i for i, message in enumerate(messages) if message["role"] in ("assistant", "model"))
    return messages[:last], messages[last]["content"].strip()


def _whole(one: Conversation) -> Messages:
    before, reply = last_turn(one)
    return [*_begun(before, one), {"role": "assistant", "content": reply}]


def _begun(messages: Messages, one: Conversation) -> Messages:
    """Messages that may follow others: a system text moves into the first turn of the user."""
    if messages[0]["role"] != "system":
        return messages
    if len(messages) < 2:
        raise UserError(f"{one.place}: the model answers a system message alone; add the user's.")
    first = f"{messages[0]['content']}\n\n{messages[1]['content']}"
    return [{**messages[1], "content": first}, *messages[2:]]


def _as_text(messages: Messages) -> str:
    return "".join(message["content"].strip() + "\n" for message in messages)


def score_reply(scorer: Scorer | None, one: Conversation, reply: str) -> Scores:
    """What a reply is worth; `exact_match` is always among it."""
    reply = reply.strip()
    own: Scores = {EXACT_MATCH: (float(reply == last_turn(one)[1]), 1.0)}
    if scorer is None:
        return own
    try:
        given: Any = scorer(one.row, reply)
    except Exception as error:  # whatever a function of the user's may raise
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise UserError(
            f"the scorer fails on {one.place} ({type(error).__name__}: {error!s:.120}, at "
            f"{frame.filename} line {frame.lineno}); mend it."
        ) from error
    named = given if isinstance(given, Mapping) else {"score": given}
    try:
        found = {str(name): _pair(value) for name, value in named.items()}
    except (TypeError, ValueError):
        raise UserError(
            f"the scorer returns {given!r:.80} for {one.place}; it must return a finite number, "
            "a pair (total, weight) of them, or a dict of either."
        ) from None
    return found | own


def _pair(value: Any) -> tuple[float, float]:
    total, weight = value if isinstance(value, tuple) else (value, 1.0)
    pair = float(total), float(weight)
    if not all(map(math.isfinite, pair)) or pair[1] < 0:
        raise ValueError
    return pair


def totals(rows: Sequence[Scores]) -> dict[str, dict[str, Any]]:
    """{"value", "stderr"} of each metric: the ratio of its sums, 0 where nothing has weight, and
    the standard error of that by its linear part (of a mean, the usual one).

    A metric that is missing in a row has no weight there.
    """
    found = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        total, weight = np.asarray([row.get(name, (0.0, 0.0)) for row in rows], np.float64).T
        value, error = 0.0, None
        if weight.sum():
            value = float(total.sum() / weight.sum())
            if len(rows) > 1:
                parts = (total - value * weight) / weight.mean()
                error = float(parts.std(ddof=1) / math.sqrt(len(rows)))
        found[name] = {"value": value, "stderr": error}
    return found
