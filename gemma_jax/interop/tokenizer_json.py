"""Hugging Face's tokenizer.json for a SentencePiece BPE, and back.

It says BPE as an ordered list of merges, SentencePiece as a score for each piece: each way to cut a
piece into two pieces is a merge, and merges stand in the order of their pieces' scores.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gemma_jax import files
from gemma_jax.data.tokenizer import BOS, CONTROL_NAME, MODEL_FILE, SPACE, UNK, Tokenizer
from gemma_jax.errors import UserError
from gemma_jax.interop.pieces import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    build,
    read,
)

FILE = "tokenizer.json"
# Known to transformers for images alone, one past the vocabulary of the text model.
_IMAGE_TOKEN = "<image_soft_token>"
_NORMALIZER = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
_PRE_TOKENIZER = {
    "type": "Split",
    "pattern": {"String": " "},
    "behavior": "MergedWithPrevious",
    "invert": False,
}
_DECODER = {
    "type": "Sequence",
    "decoders": [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ],
}


def dumps(tokenizer: Tokenizer) -> str:
    """The file's content. Runs of whitespace and control pieces are its added tokens.

    Raises:
      UserError: if the tokenizer holds what a list of merges cannot say.
    """
    proto = read(tokenizer)
    if unused := [piece.piece for piece in proto.pieces if piece.type == UNUSED]:
        raise UserError(
            f"the tokenizer has the unused piece {unused[0]!r:.40}, which {FILE} cannot say; "
            "export to gguf."
        )
    control = set(tokenizer.control_ids.values())
    added = []
    for i, piece in enumerate(proto.pieces):
        if i in control or piece.type == USER_DEFINED:
            added.append(
                {
                    "id": i,
                    "content": piece.piece,
                    "single_word": False,
                    "lstrip": False,
                    "rstrip": False,
                    # Runs of spaces are found after spaces have become U+2581.
                    "normalized": SPACE in piece.piece,
                    "special": i in control,
                }
            )
    pieces = [piece.piece for piece in proto.pieces]
    scores = [piece.score for piece in proto.pieces]
    types = [piece.type for piece in proto.pieces]
    bos = pieces[BOS]
    start = {"SpecialToken": {"id": bos, "type_id": 0}}
    single = [start, {"Sequence": {"id": "A", "type_id": 0}}]
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": _NORMALIZER,
        "pre_tokenizer": _PRE_TOKENIZER,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": single,
            "pair": [
                *single,
                {"SpecialToken": {"id": bos, "type_id": 1}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {bos: {"id": bos, "ids": [BOS], "tokens": [bos]}},
        },
        "decoder": _DECODER,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": pieces[UNK],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece: i for i, piece in enumerate(pieces)},
            "merges": _merges(pieces, scores, types),
        },
    }
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"))


def load(path: Path, *, exact: bool = False) -> Tokenizer:
    """The SentencePiece model of a file, with its ids; `exact` as in `Tokenizer`.

    Raises:
      UserError: if the file is not a BPE that SentencePiece can say.
    """
    content = files.read_json(path, "the tokenizer of a Hugging Face model")
    try:
        _check_kind(content, path)
        pieces, types = _pieces(content, path)
        merges = [
            (merge.partition(" ")[0], merge.partition(" ")[2])
            if isinstance(merge, str)
            else (merge[0], merge[1])
            for merge in content["model"]["merges"]
        ]
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise _refused(path, f"it cannot be read ({error!r})") from error
    scores = _scores(pieces, types, merges, path)
    return build(pieces, scores, types, str(path), exact=exact)


def _merges(
    pieces: Sequence[str], scores: Sequence[float], types: Sequence[int]
) -> list[tuple[str, str]]:
    """All cuts of normal pieces in two, best piece first; user-defined pieces never merge."""
    ids = {piece: i for i, piece in enumerate(pieces) if types[i] == NORMAL}
    merges: list[tuple[str, str]] = []
    for i in sorted(ids.values(), key=lambda i: -scores[i]):
        piece = pieces[i]
        cuts = [(piece[:n], piece[n:]) for n in range(1, len(piece))]
        merges += sorted(
            [(a, b) for a, b in cuts if a in ids and b in ids],
            key=lambda cut: (ids[cut[0]], ids[cut[1]]),
        )
    return merges


def _check_kind(content: Mapping[str, Any], path: Path) -> None:
    model = content["model"]
    if model.get("type") != "BPE" or not model.get("byte_fallback"):
        raise _refused(path, f"its model is {model.get('type')} without byte fallback")
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout", "ignore_merges"):
        if model.get(key):
            raise _refused(path, f"it sets {key}")
    if content.get("normalizer") != _NORMALIZER:
        raise _refused(path, "its normalizer is not the one that writes U+2581 for a space")
    # Spaces are gone by then: a cut at spaces cuts nothing.
    if content.get("pre_tokenizer") not in (None, _PRE_TOKENIZER):
        raise _refused(path, "it cuts the text before it merges")


def _pieces(content: Mapping[str, Any], path: Path) -> tuple[list[str], list[int]]:
    """The pieces by id, and their types."""
    vocab: dict[str, int] = dict(content["model"]["vocab"])
    size = len(vocab)
    kinds: dict[int, int] = {}
    for token in content["added_tokens"]:
        piece, i = str(token["content"]).replace(" ", SPACE), int(token["id"])
        if piece == _IMAGE_TOKEN and i >= size:
            continue
        if vocab.setdefault(piece, i) != i:
            raise _refused(path, f"it has {piece!r:.40} at the ids {vocab[piece]} and {i}")
        control = token.get("special") or CONTROL_NAME.fullmatch(piece)
        kinds[i] = CONTROL if control else USER_DEFINED
    pieces = sorted(vocab, key=vocab.__getitem__)
    if [vocab[piece] for piece in pieces] != list(range(len(pieces))):
        raise _refused(path, "its ids leave gaps")
    types = []
    for i, piece in enumerate(pieces):
        byte = len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")
        types.append(UNKNOWN if i == UNK else kinds.get(i, BYTE if byte else NORMAL))
    return pieces, types


def _scores(
    pieces: Sequence[str], types: Sequence[int], merges: Sequence[tuple[str, str]], path: Path
) -> list[float]:
    """Scores that rank the pieces as the merges do; pieces without a merge come last."""
    normal = {piece for piece, kind in zip(pieces, types, strict=True) if kind == NORMAL}
    ranks: dict[str, int] = {}
    for left, right in merges:
        if left + right in normal:
            ranks.setdefault(left + right, len(ranks))
    last = len(ranks)
    scores = []
    for piece, kind in zip(pieces, types, strict=True):
        if kind == NORMAL and piece not in ranks:
            ranks[piece] = last
            last += 1
        scores.append(-float(ranks[piece]) if kind == NORMAL else 0.0)
    ours = _merges(pieces, scores, types)
    if set(ours) != {merge for merge in merges if merge[0] + merge[1] in normal}:
        raise _refused(path, "it lacks merges that SentencePiece would make")
    return scores


def _refused(path: Path, why: str) -> UserError:
    return UserError(
        f"{path} is not a SentencePiece BPE like Gemma's: {why}; give the model's {MODEL_FILE} "
        "instead."
    )
