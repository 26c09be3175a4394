"""The tokenizer: SentencePiece BPE that gives every text back byte for byte.

Settings as for Gemma (Gemma 3 report, arXiv 2503.19786, section 2): digits split, whitespace kept,
bytes for what the vocabulary lacks, and the control pieces at Gemma's ids. It departs from Gemma in
two places, both for the sake of exactness: the names of control pieces in ordinary text stay text,
and a literal U+2581, which SentencePiece reads as a space, becomes its three bytes. The latter only
in tokenizers that are trained here: a model that comes from elsewhere learned with its own ids.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from gemma_jax import buckets, files
from gemma_jax.errors import UserError, require_fractions, require_positive

PAD, EOS, BOS, UNK = 0, 1, 2, 3
START_OF_TURN, END_OF_TURN = 105, 106
MODEL_FILE = "tokenizer.model"

CONTROL_PIECES = (  # ids 4 to 106, in order
    "<mask>",
    "[multimodal]",
    *(f"<unused{n}>" for n in range(99)),
    "<start_of_turn>",
    "<end_of_turn>",
)
# Runs of newlines and tabs: no other piece holds either character, as the trainer sees single
# lines without tabs, so a text may be cut after such a run.
WHITESPACE_PIECES = (*("\n" * n for n in range(1, 5)), *("\t" * n for n in range(1, 5)))
SPACE = "\u2581"  # SentencePiece's stand-in for the space
# What Gemma's own model holds as user-defined pieces, matched wherever they stand in a text. The
# other user-defined pieces (whitespace, HTML tags) are text.
CONTROL_NAME = re.compile(
    r"<mask>|\[multimodal\]|<unused\d+>|<(start|end)_of_(turn|image)>|<image_soft_token>"
)
_CONTROL_SHAPE = re.compile(r"<[^<>\[\]]+>|\[[^<>\[\]]+\]")  # no control name hides in another
_EXACT_SYMBOLS = (CONTROL_PIECES, WHITESPACE_PIECES)
_CUT_CHARS = 1 << 16  # BPE takes memory in proportion to what it sees at once
_CUT_PLACE = re.compile(r"(?<=\n)(?=[^\n])|(?<=[^ \n\t])(?= )")
_ROUND_TRIP_PROBE = "  a\u00a0 b\r\n\n\tﬁ e\u0301 \u2581<bos><start_of_turn>\x00\ufeff 12 🙂 "

sentencepiece.SetMinLogLevel(3)


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """How to train a tokenizer.

    Args:
      vocab_size: pieces in all; 371 of them are control pieces, whitespace and bytes.
      sample_bytes: UTF-8 bytes of the corpus to train on, drawn document by document.
      seed: which documents are drawn.
      character_coverage: share of the sample's characters that get pieces; bytes spell the rest.
    """

    vocab_size: int = 8192
    sample_bytes: int = 10_000_000
    seed: int = 0
    character_coverage: float = 0.9995

    def __post_init__(self) -> None:
        least = 4 + len(CONTROL_PIECES) + len(WHITESPACE_PIECES) + 256
        if self.vocab_size <= least:
            raise UserError(
                f"vocab_size {self.vocab_size} leaves no room for words: {least} ids are control "
                f"pieces, whitespace and bytes; set vocab_size to 512 or more."
            )
        require_positive(self, "sample_bytes", "character_coverage")
        require_fractions(self, "character_coverage")


class Tokenizer:
    """Text to ids and back. Without BOS and EOS: whoever builds a document adds them.

    `exact` says whether a literal U+2581 in a text is kept, by its bytes; else it is read as a
    space, as SentencePiece does.
    """

    def __init__(self, model: bytes, name: str = "the model"):
        """Takes a serialized SentencePiece model; `name` stands for it in messages.

        Raises:
          UserError: if it is no SentencePiece model, or one that loses text.
        """
        self.model = model
        try:
            proto = ModelProto.FromString(model)
            if not proto.pieces:
                raise ValueError("no pieces")  # what becomes of an empty file
            # As control pieces their names are never matched in a text.
            if _tame(proto):
                model = proto.SerializeToString()
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, ValueError, DecodeError) as error:
            raise UserError(f"{name} is not a SentencePiece model; train one anew.") from error
        self.exact = is_exact(proto)
        kinds = ModelProto.SentencePiece
        self._bytes = [_piece_bytes(piece) for piece in proto.pieces]
        self._byte_ids = {
            self._bytes[i]: i for i, piece in enumerate(proto.pieces) if piece.type == kinds.BYTE
        }
        self.control_ids = {  # by name; the pieces that stand for no text
            piece.piece: i
            for i, piece in enumerate(proto.pieces)
            if piece.type in (kinds.CONTROL, kinds.UNKNOWN)
        }
        if self.decode(self.encode(_ROUND_TRIP_PROBE)) != self._read(_ROUND_TRIP_PROBE):
            raise UserError(
                f"{name} changes text (it normalises, or has no bytes to fall back on), but every "
                "text has to come back byte for byte; train one with `gemma-jax tokenizer train`."
            )

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Reads a model file, or the `tokenizer.model` of a token set's folder."""
        path = buckets.place(path) if isinstance(path, str) else path
        if path.is_dir():
            path = path / MODEL_FILE
        try:
            return cls(path.read_bytes(), str(path))
        except FileNotFoundError:
            raise UserError(
                f"there is no tokenizer at {path}; give a SentencePiece model file or the folder "
                "of a token set."
            ) from None
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}); copy it again.") from None

    @property
    def vocab_size(self) -> int:
        return len(self._bytes)

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the model file, in hex."""
        return hashlib.sha256(self.model).hexdigest()

    @cached_property
    def cuts_at_newlines(self) -> bool:
        """Whether no piece reaches from a newline to another character.

        Then a text may be cut after a run of newlines, and the ids stay the same.
        """
        return all(piece.count(b"\n") in (0, len(piece)) for piece in self._bytes)

    def save(self, path: str | Path) -> None:
        files.write_bytes(path, self.model)

    def encode(self, text: str, *, control: bool = False) -> list[int]:
        """The ids of `text`; with `control`, names of control pieces in it give their ids."""
        if not control:
            return self.encode_batch([text])[0]
        ids: list[int] = []
        start = 0
        for found in _CONTROL_SHAPE.finditer(text):
            if (control_id := self.control_ids.get(found[0])) is not None:
                ids += [*self.encode(text[start : found.start()]), control_id]
                start = found.end()
        return ids + self.encode(text[start:])

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]:
        """Encodes many texts at once, on `threads` threads outside of Python's lock."""
        return self._spell([self._read(text) for text in texts], threads)

    def spell(self, text: str) -> list[int]:
        """Ids that `decode` turns into `text`, a literal U+2581 kept whether `exact` or not."""
        return self._spell([text], 1)[0]

    def _spell(self, texts: Sequence[str], threads: int) -> list[list[int]]:
        fragments: list[str] = []
        plans: list[list[int | None]] = []  # None takes the next fragment, an int is a byte piece
        for text in texts:
            if len(text) <= _CUT_CHARS and SPACE not in text:
                fragments.append(text)
                plans.append([None])
            else:
                plans.append(self._plan(text, fragments))
        if threads == 1:  # starting even one thread costs more than a short text
            encoded = iter([self._processor.encode(fragment) for fragment in fragments])
        else:
            encoded = iter(self._processor.encode(fragments, num_threads=threads))
        results = []
        for plan in plans:
            if plan == [None]:
                results.append(next(encoded))
                continue
            ids: list[int] = []
            for byte_id in plan:
                if byte_id is None:
                    ids.extend(next(encoded))
                else:
                    ids.append(byte_id)
            results.append(ids)
        return results

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; control pieces stand for nothing, broken UTF-8 becomes U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        known = len(self._bytes)  # a model may have more rows than the tokenizer has pieces
        return b"".join([self._bytes[i] for i in ids if i < known])

    def token_bytes(self) -> np.ndarray:
        """int32 [V]: UTF-8 bytes that each id stands for, 0 for control pieces.

        Sums over `encode(text)` to exactly `len(text.encode())`, U+2581 read as `exact` says.
        """
        return np.array([len(piece) for piece in self._bytes], np.int32)

    def _read(self, text: str) -> str:
        """The text that `decode` gives back."""
        return text if self.exact else text.replace(SPACE, " ")

    def _plan(self, text: str, fragments: list[str]) -> list[int | None]:
        plan: list[int | None] = []
        spelled = [self._byte_ids.get(bytes([b]), UNK) for b in SPACE.encode()]
        for number, stretch in enumerate(text.split(SPACE)):
            if number:
                plan.extend(spelled)
            cuts = _cut_long(stretch)
            fragments.extend(cuts)
            plan.extend([None] * len(cuts))
        return plan


def is_exact(proto: ModelProto) -> bool:
    """Whether a model was trained here, or marked as such: its trainer's record says so."""
    spec = proto.trainer_spec
    return (tuple(spec.control_symbols), tuple(spec.user_defined_symbols)) == _EXACT_SYMBOLS


def mark_exact(proto: ModelProto) -> None:
    """Writes into a model what `is_exact` looks for; its hash changes with it."""
    proto.trainer_spec.control_symbols.extend(CONTROL_PIECES)
    proto.trainer_spec.user_defined_symbols.extend(WHITESPACE_PIECES)


def _tame(proto: ModelProto) -> bool:
    """Makes control pieces of those that Gemma holds as user-defined; says whether any were."""
    kinds = ModelProto.SentencePiece
    tamed = False
    for piece in proto.pieces:
        if piece.type == kinds.USER_DEFINED and CONTROL_NAME.fullmatch(piece.piece):
            piece.type = kinds.CONTROL
            tamed = True
    return tamed


def _piece_bytes(piece: ModelProto.SentencePiece) -> bytes:
    if piece.type in (piece.CONTROL, piece.UNKNOWN):
        return b""
    if piece.type == piece.BYTE:
        return bytes([int(piece.piece[3:5], 16)])
    return piece.piece.replace(SPACE, " ").encode()


def _cut_long(text: str) -> list[str]:
    """Cuts a long text where no piece can reach across, so that the ids do not change by it."""
    pieces, start = [], 0
    while len(text) - start > _CUT_CHARS:
        found = _CUT_PLACE.search(text, start + _CUT_CHARS, start + 2 * _CUT_CHARS)
        end = found.start() if found else min(start + 2 * _CUT_CHARS, len(text))
        pieces.append(text[start:end])
        start = end
    pieces.append(text[start:])
    return pieces
