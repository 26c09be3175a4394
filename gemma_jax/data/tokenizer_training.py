"""Training of a tokenizer on a sample of texts: the settings are Gemma's (see tokenizer.py)."""

import hashlib
import heapq
import io
import re
from collections.abc import Iterable
from pathlib import Path

import sentencepiece

from gemma_jax.data.tokenizer import (
    BOS,
    CONTROL_PIECES,
    EOS,
    PAD,
    SPACE,
    UNK,
    WHITESPACE_PIECES,
    Tokenizer,
    TokenizerConfig,
)
from gemma_jax.errors import UserError


def train_tokenizer(texts: Iterable[str], config: TokenizerConfig, path: str | Path) -> Tokenizer:
    """Trains a BPE model on a sample of `texts` and writes it to `path`.

    The same documents in any order give the same bytes. All of `texts` is read; memory holds the
    sample alone.

    Raises:
      UserError: if the vocabulary is too large or too small for the sample, or there is another
        tokenizer at `path`.
    """
    there = Path(path).read_bytes() if Path(path).is_file() else None
    if there is not None and Tokenizer(there, str(path)).vocab_size != config.vocab_size:
        raise _is_taken(path)  # at once: training would take a while
    sample = _sample(texts, config)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(sample),
            model_writer=model,
            model_type="bpe",
            vocab_size=config.vocab_size,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            character_coverage=config.character_coverage,
            max_sentence_length=1 << 30,
            pad_id=PAD,
            eos_id=EOS,
            bos_id=BOS,
            unk_id=UNK,
            pad_piece="<pad>",
            eos_piece="<eos>",
            bos_piece="<bos>",
            unk_piece="<unk>",
            control_symbols=list(CONTROL_PIECES),
            user_defined_symbols=list(WHITESPACE_PIECES),
            minloglevel=3,
        )
    except (RuntimeError, ValueError) as error:
        raise _training_error(str(error), config) from error
    tokenizer = Tokenizer(model.getvalue(), str(path))
    if there is None:
        tokenizer.save(path)
    elif tokenizer.model != there:
        raise _is_taken(path)
    return tokenizer


def _is_taken(path: str | Path) -> UserError:
    return UserError(
        f"{path} is another tokenizer already, of other text or settings; choose another path, or "
        "delete that file."
    )


def _training_error(message: str, config: TokenizerConfig) -> Exception:
    if found := re.search(r"too high.*<= (\d+)", message):
        return UserError(
            f"vocab_size {config.vocab_size} is too large for this corpus, which supports at most "
            f"{found[1]}; set vocab_size to {found[1]} or less, or give more text."
        )
    if found := re.search(r"required_chars.*?(\d+) vs (\d+)", message, re.DOTALL):
        return UserError(
            f"vocab_size {config.vocab_size} is too small for the characters of this corpus, which "
            f"take {found[2]}; set vocab_size above that, or lower "
            "character_coverage."
        )
    if "!sentences_.empty()" in message or "empty" in message.lower():
        return UserError("the corpus has no text to train a tokenizer on; give more documents.")
    return RuntimeError(f"SentencePiece failed to train: {message}")


def _sample(texts: Iterable[str], config: TokenizerConfig) -> list[str]:
    """The documents with the smallest hashes that fill `sample_bytes`, in the order of hashes."""
    heap, held = list[tuple[int, int, str]](), 0
    key = config.seed.to_bytes(8, "little", signed=True)
    for text in texts:
        data = text.encode()
        priority = int.from_bytes(hashlib.blake2b(data, digest_size=8, key=key).digest(), "little")
        if held >= config.sample_bytes and -priority <= heap[0][0]:
            continue
        heapq.heappush(heap, (-priority, len(data), text))
        held += len(data)
        while held - heap[0][1] >= config.sample_bytes:
            held -= heapq.heappop(heap)[1]
    return [text for _, _, text in sorted(heap, reverse=True)]


def _lines(texts: Iterable[str]) -> Iterable[str]:
    for text in texts:
        for line in re.split(f"[\n\t\x00{SPACE}]+", text):
            if line:
                yield line
