"""Encoding of texts that share most of their lines, as few-shot prompts do."""

import re

from gemma_jax.data.tokenizer import Tokenizer

_LINE_END = re.compile(r"(?<=\n)(?=[^\n])")  # a run of newlines may be one piece
_LINES_KEPT = 1 << 16


class LineEncoder:
    """`Tokenizer.encode`, each line computed once; the ids are the same."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._whole = not tokenizer.cuts_at_newlines
        self._lines: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        if self._whole:
            return self._tokenizer.encode(text)
        ids: list[int] = []
        for line in _LINE_END.split(text):
            known = self._lines.get(line)
            if known is None:
                if len(self._lines) >= _LINES_KEPT:
                    self._lines.clear()
                known = self._lines[line] = self._tokenizer.encode(line)
            ids += known
        return ids
