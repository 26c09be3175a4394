"""What a text may be: a JSON schema, a regular expression or a Lark grammar, token by token.

llguidance (Microsoft, MIT) does the parsing: from the bytes of every piece it says which tokens may
follow. What is added here is a way to an end, for texts that run into a limit.
"""

import json
import random
import re
import string
from dataclasses import dataclass
from typing import Any, Literal

import llguidance
import llguidance.numpy
import numpy as np

from gemma_jax.data.chat import check_unicode
from gemma_jax.data.tokenizer import BOS, END_OF_TURN, EOS, Tokenizer
from gemma_jax.errors import UserError
from gemma_jax.generation.patterns import portable
from gemma_jax.generation.schemas import schema_text

_CLOSING = b'"}]'  # what ends a value of JSON
_ATTEMPTS = 200  # to find a way to the end
# As json.dumps writes: a model is not left to choose between ways to lay out the same value.
_JSON_LAYOUT: dict[str, Any] = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
}


@dataclass(frozen=True)
class Grammar:
    """A language that a text has to belong to. Made by `json_schema`, `regex` or `lark`."""

    kind: Literal["schema", "regex", "grammar"]
    source: str  # for llguidance


def json_schema(schema: dict[str, Any] | bool | str) -> Grammar:
    """JSON values that a schema allows, written as `json.dumps` writes them.

    `schema` is the parsed schema or its text. Draft 2020-12, or what its `$schema` says, but for
    what llguidance leaves out; `GrammarMatcher` refuses a keyword that it would not obey.
    """
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise UserError(f"the schema is not valid JSON: {error}; mend it.") from None
    if schema is False:
        raise UserError("the schema is false, which no value meets; give another.")
    if schema is not True and not isinstance(schema, dict):
        raise UserError(f"the schema is {json.dumps(schema)[:60]}; a schema is an object or true.")
    text = schema_text({} if schema is True else schema)
    compiled = llguidance.LLMatcher.grammar_from_json_schema(text, overrides=_JSON_LAYOUT)  # type: ignore[arg-type]
    return Grammar("schema", compiled)


def regex(pattern: str) -> Grammar:
    """Texts that match a regular expression as a whole (Rust's syntax: no look-around).

    Of \\w, \\s and their opposites those letters alone that Python's `re` takes too.
    """
    check_unicode(pattern, "the regular expression")
    plain = portable(pattern, schema=False)
    return Grammar("regex", llguidance.LLMatcher.grammar_from_regex(plain))


def lark(grammar: str) -> Grammar:
    """Texts of a context-free grammar in Lark's notation; the rule `start` is the whole."""
    check_unicode(grammar, "the grammar")
    return Grammar("grammar", llguidance.LLMatcher.grammar_from_lark(grammar))


class _Enders:
    """A token for every byte, by kind: digits, letters and so on.

    `ways` are the manners of drawing them: to close what is open wherever one can, and to write on,
    often more of the same kind, for what must be written before anything can be closed.
    """

    ways = 2

    def __init__(self, by_byte: dict[int, int]) -> None:
        self._quote, *self._brackets = [by_byte.get(byte) for byte in _CLOSING]
        kinds = [b"0123456789", string.ascii_lowercase.encode(), string.ascii_uppercase.encode()]
        seen = set(b"".join(kinds))
        kinds += [bytes([byte]) for byte in range(128) if byte not in seen]
        kinds.append(bytes(range(128, 256)))
        self._kinds = [[by_byte[byte] for byte in kind if byte in by_byte] for kind in kinds]

    def draw(self, bits: bytes, rng: random.Random, way: int, last: int | None) -> list[int]:
        """One token of those allowed; none where no single byte may follow.

        `last` is the token before.
        """
        if self._quote is not None and _is_set(bits, self._quote):
            return [self._quote]
        closing = [i for i in self._brackets if i is not None and _is_set(bits, i)]
        if len(closing) == 1 and way == 0:  # both are allowed within a string, where none closes
            return closing
        allowed = [[i for i in kind if _is_set(bits, i)] for kind in self._kinds]
        same = [kind for kind in allowed if last in kind]
        allowed = [kind for kind in allowed if kind]
        if same and way == 1 and rng.random() < 0.5:
            allowed = same
        return [rng.choice(rng.choice(allowed))] if allowed else []


def _is_set(bits: bytes, token: int) -> int:
    return bits[token >> 3] >> (token & 7) & 1


class GrammarTokenizer:
    """The pieces of a tokenizer as llguidance wants them; made once, for many grammars."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        """`vocab_size` is the model's, which may have more rows than there are pieces."""
        names = {number: name for name, number in tokenizer.control_ids.items()}
        pieces = [tokenizer.decode_bytes([i]) for i in range(tokenizer.vocab_size)]
        self._tokenizer = tokenizer
        # What llguidance asks of a tokenizer, besides that it can be called.
        self.eos_token_id, self.bos_token_id = EOS, BOS
        self.tokens = [names[i].encode() if i in names else x for i, x in enumerate(pieces)]
        self.special_token_ids = sorted(names)
        self.enders = _Enders({x[0]: i for i, x in enumerate(pieces) if len(x) == 1})
        self.vocab_size = vocab_size
        self.inner = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(self), n_vocab=vocab_size, eos_token=[EOS, END_OF_TURN]
        )

    def __call__(self, text: str | bytes) -> list[int]:
        if isinstance(text, bytes):
            text = text.decode("utf-8", errors="replace")
        return self._tokenizer.spell(text)  # what a grammar wants is wanted to the letter


class GrammarMatcher:
    """Where one text stands in its grammar."""

    def __init__(self, grammar: Grammar, tokenizer: GrammarTokenizer) -> None:
        """Raises UserError where the grammar cannot be obeyed, naming what is in the way."""
        self._grammar, self._tokenizer = grammar, tokenizer
        self._inner = llguidance.LLMatcher(tokenizer.inner, grammar.source, log_level=0)
        if self._inner.is_error():
            raise UserError(_refusal(grammar, self._inner.get_error()))
        self.tokens: list[int] = []

    @property
    def complete(self) -> bool:
        """Whether the text may end here."""
        return self._inner.is_accepting()

    @property
    def finished(self) -> bool:
        """Whether nothing may follow."""
        return self._inner.is_stopped()

    def forced(self) -> list[int]:
        """The tokens that must come next, where there is no choice."""
        return [] if self.finished else list(self._inner.compute_ff_tokens())

    def take(self, tokens: list[int]) -> None:
        """Raises UserError where the grammar turns out to be too large to follow, or endless."""
        if not self._inner.consume_tokens(tokens):
            message = self._inner.get_error().partition("\n<state>")[0]
            raise UserError(_refusal(self._grammar, message))
        self.tokens += tokens

    def close(self, limit: int) -> list[int] | None:
        """All tokens of a text that keeps as many as it can of these and ends within `limit`.

        None where no such text was found.
        """
        kept, back = min(len(self.tokens), limit), 0
        while True:
            start = self._inner.deep_copy()
            start.rollback(len(self.tokens) - kept)
            ending = _way_out(start, self._tokenizer.enders, limit - kept)
            if ending is not None:
                return [*self.tokens[:kept], *ending]
            if kept == 0:
                return None
            back = 2 * back or 1
            kept = max(kept - back, 0)


def _way_out(at: llguidance.LLMatcher, enders: _Enders, limit: int) -> list[int] | None:
    """Tokens after which a text may end, at most `limit`: forced ones and single bytes.

    Drawn, again and again until one is short enough: what closes a value of JSON where it may
    stand, and anything else otherwise, each kind of byte being as likely as any other, or as often
    as not the one before. So a pattern that goes round in circles is left soon. The same text
    always gets the same end.
    """
    rng = random.Random(limit)
    for attempt in range(_ATTEMPTS):
        matcher, path = at.deep_copy(), list[int]()
        while len(path) <= limit and not matcher.is_error():
            if matcher.is_accepting():
                return path
            step = list(matcher.compute_ff_tokens())
            if not step:
                last = path[-1] if path else None
                step = enders.draw(matcher.compute_bitmask(), rng, attempt % enders.ways, last)
            if not step:
                break
            matcher.consume_tokens(step)
            path += step
    return None


class Masks:
    """Which tokens may come next in each of many texts, as bits, computed on several threads."""

    def __init__(self, rows: int, vocab_size: int) -> None:
        self._bits = llguidance.numpy.allocate_token_bitmask(rows, vocab_size)
        self._executor = llguidance.LLExecutor()

    def fill(self, matchers: dict[int, GrammarMatcher]) -> np.ndarray:
        """uint32 [rows, V / 32]: bit j of word i is token 32 i + j. Rows without a matcher keep
        what they had."""
        bits = self._bits.copy()  # the device may still be reading the one before
        if matchers:
            pairs = [(matcher._inner, row) for row, matcher in matchers.items()]
            llguidance.numpy.fill_next_token_bitmask_par(self._executor, pairs, bits)
        self._bits = bits
        return bits.view(np.uint32)


def _refusal(grammar: Grammar, message: str) -> str:
    message = " ".join(re.sub(r"^\s*\d+ \|.*$|^[ |^]*$", "", message, flags=re.M).split())
    name = {"schema": "schema", "regex": "regular expression", "grammar": "grammar"}[grammar.kind]
    known = r"Unimplemented keys: \[(.*)\]|^(\w+) constraints are not|^Unknown format: (.*)"
    if found := re.search(known, message):
        keywords = found[1] or (f'"{found[2]}"' if found[2] else f'"format": "{found[3]}"')
        return (
            f"the {name} uses {keywords}, which generation cannot obey; leave that out and check "
            "it afterwards."
        )
    return f"the {name} cannot be obeyed: {message.rstrip('.')}; mend it."
