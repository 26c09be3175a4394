"""Conversations to learn from: JSON lines, checked line by line before anything is trained.

A line is an object with `messages` (see `gemma_jax.data.chat`), or with `prompt` and `completion`.
These are texts, which stand for one turn of the user and one of the model, or lists of messages, as
TRL has them. What else it holds is kept for those who score replies. Labels count where they are
the model's to say: the text of its turns and the END_OF_TURN behind each, in a `completion` alone
where there is one.
"""

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from gemma_jax.data import readers
from gemma_jax.data.chat import mark_chat, text_of
from gemma_jax.data.corpora import find_parts
from gemma_jax.data.tokenizer import Tokenizer
from gemma_jax.data.tokens import held_out_below
from gemma_jax.errors import UserError, require_fractions
from gemma_jax.progress import progress
from gemma_jax.settings import check_types

_MODEL = ("assistant", "model")
type TooLong = Literal["refuse", "cut"]


@dataclass(frozen=True, kw_only=True)
class Conversations:
    """What a model is tuned on.

    Args:
      sources: files of JSON lines (also .gz, .xz, .zst), globs or folders of them.
      valid: the same, held out; where it is empty, `valid_fraction` of the sources is, by hash.
      too_long: what happens to a conversation that is longer than a sequence: it is refused with
        its line, or cut at its end.
      tokenizer: a model file, or a folder with one; that of the run's `init` by default.
    """

    sources: tuple[str, ...]
    valid: tuple[str, ...] = ()
    valid_fraction: float = 0.05
    too_long: TooLong = "refuse"
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        for name in ("sources", "valid"):
            if isinstance(value := getattr(self, name), str):
                raise UserError(f'{name} is one text; write ("{value}",), with the comma.')
        check_types(self)
        require_fractions(self, "valid_fraction", below_one=True)
        if not self.sources:
            raise UserError("Conversations.sources is empty; give files of JSON lines.")


class Conversation(NamedTuple):
    """One line: where it stands, all that it holds (`messages` included), and its ids.

    `spoken` [n] marks the ids that are the model's to say.
    """

    place: str
    row: Mapping[str, Any]
    ids: np.ndarray
    spoken: np.ndarray


class ConversationSet(NamedTuple):
    train: list[Conversation]
    valid: list[Conversation]

    def fingerprint(self) -> dict[str, Any]:
        """Numbers and a SHA-256 that tell whether two sets would train alike."""
        digest = hashlib.sha256()
        for part in self:
            digest.update(len(part).to_bytes(8, "little"))
            for one in part:
                digest.update(len(one.ids).to_bytes(8, "little"))
                digest.update(one.ids.astype("<i4").tobytes() + one.spoken.tobytes())
        return {
            "train": len(self.train),
            "valid": len(self.valid),
            "train_tokens": sum(len(one.ids) for one in self.train),
            "sha256": digest.hexdigest(),
        }


def read_conversations(
    data: Conversations, tokenizer: Tokenizer, seq_len: int | None = None
) -> ConversationSet:
    """All conversations, split.

    Raises:
      UserError: for a line that cannot be read, is no conversation, teaches nothing or does not fit
        into `seq_len` tokens; it names the file and the line.
    """
    train = read_all(data.sources, tokenizer, seq_len, data.too_long)
    if data.valid:
        return ConversationSet(train, read_all(data.valid, tokenizer, seq_len, data.too_long))
    keys = [_key(one.row["messages"]) for one in train]
    below = held_out_below(np.unique(np.array(keys, np.uint64)), data.valid_fraction)
    split = ConversationSet([], [])
    for one, key in zip(train, keys, strict=True):
        (split.valid if key < below else split.train).append(one)
    if not split.valid:
        raise UserError(
            f"no conversation of {', '.join(data.sources)} is held out; give data.valid, or a "
            "data.valid_fraction above 0 and two different conversations at least."
        )
    return split


def _key(messages: Sequence[Mapping[str, str]]) -> int:
    text = json.dumps([[message["role"], message["content"]] for message in messages])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def read_all(
    sources: tuple[str, ...],
    tokenizer: Tokenizer,
    seq_len: int | None = None,
    too_long: TooLong = "refuse",
) -> list[Conversation]:
    """The conversations of all sources in their order; refuses as `read_conversations` does."""
    parts = find_parts(sources)
    for part in parts:
        if part.kind != "jsonl":
            raise UserError(f"{part.name} is not a file of JSON lines (.jsonl); convert it.")
    found, silent = [], 0
    with progress("read conversations", sum(part.size() for part in parts)) as advance:
        for part in parts:
            for place, row in readers.json_rows(part.name, once=True):
                one = _conversation(place, row, tokenizer)
                if seq_len is not None and len(one.ids) > seq_len + 1:
                    one = _shortened(one, seq_len, too_long)
                if one.spoken[1:].any():
                    found.append(one)
                else:
                    silent += 1
            advance(part.size(), part.name)
    if silent:
        print(
            f"{silent} conversation(s) of {', '.join(sources)} hold no turn of the model within "
            f"{seq_len} tokens and are left out",
            file=sys.stderr,
        )
    if not found:
        raise UserError(f"{', '.join(sources)} holds no conversation; give other files.")
    return found


def _shortened(one: Conversation, seq_len: int, too_long: TooLong) -> Conversation:
    if too_long == "refuse":
        raise UserError(
            f"{one.place}: the conversation is {len(one.ids) - 1} tokens long and seq_len is "
            f"{seq_len}; raise seq_len, shorten it, or set data.too_long='cut'."
        )
    return one._replace(ids=one.ids[: seq_len + 1], spoken=one.spoken[: seq_len + 1])


def _conversation(place: str, row: Any, tokenizer: Tokenizer) -> Conversation:
    given, asked = _messages(place, row)
    messages = list(given)
    try:
        for number, message in enumerate(messages, 1):
            if not isinstance(message, Mapping):
                continue  # `mark_chat` says what is wrong
            text = text_of(message.get("content"), str(message.get("role")))
            if text is None:
                continue
            if not text.strip():
                raise UserError(f"message {number} is empty; give it a text or remove the line.")
            if message["role"] in _MODEL and (weight := message.get("weight")) not in (None, 1):
                raise UserError(
                    f"message {number} has weight={weight!r:.20}, but all turns of the assistant "
                    "count alike; give those that shall not count as the `prompt` of a line with "
                    "`prompt` and `completion`, or leave the weight out."
                )
            messages[number - 1] = {**message, "content": text}
        marked = mark_chat(tokenizer, messages)
        ids, spoken = (np.array(column) for column in zip(*marked, strict=True))
        if any(message["role"] in _MODEL for message in messages[:asked]):  # given, not learned
            before = mark_chat(tokenizer, messages[:asked], add_generation_prompt=True)
            spoken[: len(before)] = False
    except UserError as error:
        raise UserError(f"{place}: {error}") from None
    if not spoken.any():
        raise UserError(
            f"{place}: the conversation has no turn of the assistant to learn; add one, or remove "
            "the line."
        )
    return Conversation(place, {**row, "messages": messages}, ids.astype(np.int32), spoken)


def _messages(place: str, row: Any) -> tuple[list[Any], int]:
    """All messages of a line, and how many of them are the prompt; 0 where none is told apart."""
    given = sorted({"messages", "prompt", "completion"} & set(row) if isinstance(row, dict) else ())
    if given == ["messages"] and isinstance(row["messages"], list):
        return row["messages"], 0
    if given == ["completion", "prompt"] and all(isinstance(row[x], (str, list)) for x in given):
        prompt, completion = (
            [{"role": role, "content": row[name]}] if isinstance(row[name], str) else row[name]
            for name, role in (("prompt", "user"), ("completion", "assistant"))
        )
        _check_parts(place, prompt, completion)
        return [*prompt, *completion], len(prompt)
    has = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
    raise UserError(
        f"{place} must have either a list `messages`, or `prompt` and `completion`, texts or lists "
        f"of messages (it has: {has})."
    )


def _check_parts(place: str, prompt: list[Any], completion: list[Any]) -> None:
    """The user's word ends a prompt, and the model's begins a completion."""
    for name, part, index, roles in (
        ("prompt", prompt, -1, ("user",)),
        ("completion", completion, 0, _MODEL),
    ):
        edge = part[index] if part else None
        role = edge.get("role") if isinstance(edge, Mapping) else None
        if role not in roles:
            which = "end" if index else "begin"
            raise UserError(
                f"{place}: the {name} must {which} with a message of the {roles[0]} (it has: "
                f"{edge!r:.80})."
            )
