"""Gemma's chat format as token ids (Gemma 3 report, arXiv 2503.19786, section 3 and Table 4).

    <bos><start_of_turn>user
    text<end_of_turn>
    <start_of_turn>model
    text<end_of_turn>

A system text goes in front of the first user turn's. Only the format itself gives control pieces:
their names inside of a message stay text, whereas transformers, which writes the conversation out
as one string by its chat template, turns them into control pieces.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from gemma_jax.data.tokenizer import BOS, END_OF_TURN, START_OF_TURN, Tokenizer
from gemma_jax.errors import UserError

# What another format would say besides a message's content. All other keys are ignored, as by
# transformers.
_CALLS = ("tool_calls", "function_call")

# The same format in Jinja. Texts may come as lists of parts. The tag `generation`, which is
# transformers' own, marks what `mark_chat` does: the model's text and the <end_of_turn> after it,
# not the newline behind.
MARKED_CHAT_TEMPLATE = """\
{%- macro text(content, trimmed=true) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- else -%}
        {%- for part in content if part['type'] == 'text' -%}
            {{- part['text'] | trim if trimmed else part['text'] -}}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{{- bos_token -}}
{%- set prefix = '' -%}
{%- set turns = messages -%}
{%- if messages[0]['role'] == 'system' -%}
    {%- set prefix = text(messages[0]['content'], false) + '\\n\\n' -%}
    {%- set turns = messages[1:] -%}
{%- endif -%}
{%- for turn in turns -%}
    {%- set role = 'model' if turn['role'] == 'assistant' else turn['role'] -%}
    {%- if role != ('user' if loop.index0 % 2 == 0 else 'model') -%}
        {{- raise_exception('user and assistant turns must alternate, and user begins') -}}
    {%- endif -%}
    {{- '<start_of_turn>' + role + '\\n' -}}
    {%- if loop.first -%}
        {{- prefix -}}
    {%- endif -%}
    {%- if role == 'model' -%}
        {%- generation -%}
            {{- text(turn['content']) | trim -}}
            {{- '<end_of_turn>' -}}
        {%- endgeneration -%}
    {%- else -%}
        {{- text(turn['content']) | trim -}}
        {{- '<end_of_turn>' -}}
    {%- endif -%}
    {{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<start_of_turn>model\\n' -}}
{%- endif -%}
"""
# For programs whose Jinja knows no such tag.
CHAT_TEMPLATE = re.sub(r" *\{%- (end)?generation -%\}\n", "", MARKED_CHAT_TEMPLATE)


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, str]],
    *,
    add_generation_prompt: bool,
) -> list[int]:
    """The ids of a conversation, BOS included.

    Args:
      tokenizer: one with Gemma's turn pieces.
      messages: `role` (system, user, assistant or model) and `content` of each message.
      add_generation_prompt: whether to open a turn of the model at the end.

    Raises:
      UserError: if a message cannot be read or stands in the wrong place.
    """
    marked = mark_chat(tokenizer, messages, add_generation_prompt=add_generation_prompt)
    return [token for token, _ in marked]


def mark_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, str]],
    *,
    add_generation_prompt: bool = False,
) -> list[tuple[int, bool]]:
    """Like `encode_chat`, with each id the answer to "is it the model's to say?".

    That is the text of its turns and the END_OF_TURN after it, not the line that opens the turn.
    """
    _require_turn_pieces(tokenizer)
    marked = [(BOS, False)]
    newline = [(token, False) for token in tokenizer.encode("\n")]
    for role, text in _turns(messages):
        spoken = role == "model"
        marked.append((START_OF_TURN, False))
        if spoken:
            marked += [(token, False) for token in tokenizer.encode("model\n")]
            marked += [(token, True) for token in tokenizer.encode(text)]
        else:  # in one: newlines at the beginning of a system text join the one after "user"
            marked += [(token, False) for token in tokenizer.encode(f"user\n{text}")]
        marked += [(END_OF_TURN, spoken), *newline]
    if add_generation_prompt:
        opening = [START_OF_TURN, *tokenizer.encode("model\n")]
        marked += [(token, False) for token in opening]
    return marked


def has_turn_pieces(tokenizer: Tokenizer) -> bool:
    names = tokenizer.control_ids
    return (names.get("<start_of_turn>"), names.get("<end_of_turn>")) == (
        START_OF_TURN,
        END_OF_TURN,
    )


def _require_turn_pieces(tokenizer: Tokenizer) -> None:
    if not has_turn_pieces(tokenizer):
        raise UserError(
            f"the tokenizer has no <start_of_turn> and <end_of_turn> at ids {START_OF_TURN} and "
            f"{END_OF_TURN}, which Gemma's chat format needs; take a tokenizer of gemma_jax or of "
            "Gemma 3."
        )


def _turns(messages: Sequence[Mapping[str, str]]) -> list[tuple[str, str]]:
    """The turns as ("user" or "model", text), the system text in front of the first."""
    turns: list[tuple[str, str]] = []
    prefix = ""
    for number, message in enumerate(messages, 1):
        role, content = _read(message, number)
        if role == "system":
            if number > 1:
                raise UserError(
                    f"message {number} is a system message, but only the first may be one; move "
                    "its text to the beginning."
                )
            prefix = content + "\n\n"
            continue
        expected = "model" if len(turns) % 2 else "user"
        if role != expected:
            raise UserError(
                f"message {number} is of the {'assistant' if role == 'model' else role}, but the "
                f"{'assistant' if expected == 'model' else expected} speaks there; user and "
                "assistant must alternate, and the user begins."
            )
        turns.append((role, (prefix if not turns else "") + content.strip()))
    if not turns:
        raise UserError(
            "the conversation has no user message; give at least one message of the role user."
        )
    return turns


def _read(message: Mapping[str, str], number: int) -> tuple[str, str]:
    if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
        raise UserError(f"message {number} is {message!r:.80}; give it a role and a content.")
    role, content = message["role"], message["content"]
    if role not in ("system", "user", "assistant", "model"):
        raise UserError(
            f"message {number} has the role {role!r:.80}; use system, user, assistant or model."
        )
    text = text_of(content, role)
    if text is None:
        raise UserError(
            f"message {number} has a content of type {type(content).__name__}; give it as a "
            "string, or a list of parts of the type text."
        )
    check_unicode(text, f"message {number}")
    for name in _CALLS:
        if message.get(name):
            raise UserError(
                f"message {number} has {name}, for which Gemma's chat format has no place; write "
                "them into its content, or leave them out."
            )
    return "model" if role == "assistant" else role, text


def check_unicode(text: str, name: str) -> None:
    """Refuses half a surrogate pair, as JSON can spell it: it is no character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{name} holds half a surrogate pair, which is no Unicode text; remove it."
        ) from None


def text_of(content: Any, role: str) -> str | None:
    """The text of a message's content, a string or parts of the type text; None for anything else.

    Parts are written one behind the other, those of a turn each without the space around it, as
    Gemma's own template does.
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not all(isinstance(part, Mapping) for part in content):
        return None
    texts = [part.get("text") for part in content if part.get("type") == "text"]
    known = [text for text in texts if isinstance(text, str)]
    if len(known) < len(content):
        return None
    return "".join(known if role == "system" else map(str.strip, known))
