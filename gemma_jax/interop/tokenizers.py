"""One SentencePiece model in the formats of others, and back.

GGUF keeps the pieces, scores and types of a SentencePiece model, with two changes: pieces that
Gemma holds as user-defined, so that their names are matched in texts, are control pieces there,
and user-defined runs of spaces hold spaces. Hugging Face's tokenizer.json: see tokenizer_json.py.
Neither can say what a tokenizer trained here does with a literal U+2581 (`Tokenizer.exact`), so a
key of our own does; without it texts are read in SentencePiece's way.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gemma_jax import files
from gemma_jax.data.chat import CHAT_TEMPLATE, MARKED_CHAT_TEMPLATE, has_turn_pieces
from gemma_jax.data.tokenizer import BOS, END_OF_TURN, EOS, MODEL_FILE, PAD, SPACE, UNK, Tokenizer
from gemma_jax.errors import UserError
from gemma_jax.interop import tokenizer_json
from gemma_jax.interop.pieces import CONTROL, UNUSED, USER_DEFINED, build, read

_KEY = "tokenizer.ggml."
_EXACT_GGUF, _EXACT_HF = "gemma_jax.exact_tokenizer", "gemma_jax_exact"
_CONFIG = "tokenizer_config.json"


def from_gguf(fields: Mapping[str, Any], name: str) -> Tokenizer:
    """The tokenizer that a GGUF file describes.

    Args:
      fields: metadata of the file, plain values or arrays by key.
      name: the file, for messages.

    Raises:
      UserError: if keys are missing or do not describe a Gemma tokenizer.
    """
    model = _field(fields, "model", name)
    if model != "llama":
        raise UserError(
            f"{name} has {_KEY}model {model!r:.40}, but Gemma 3 has 'llama', a SentencePiece BPE; "
            "import a file of Gemma 3."
        )
    if fields.get(_KEY + "add_space_prefix", False):
        raise UserError(
            f"{name} has {_KEY}add_space_prefix true, which changes texts; import a file whose "
            "tokenizer was written as Gemma 3's, with false."
        )
    bos = _field(fields, "bos_token_id", name)
    if bos != BOS:
        raise UserError(
            f"{name} has {_KEY}bos_token_id {bos}, but Gemma 3's is {BOS}; import a file of "
            "Gemma 3."
        )
    pieces = [str(token) for token in _field(fields, "tokens", name)]
    scores = _numbers(fields, "scores", np.float32, len(pieces), name)
    types = _numbers(fields, "token_type", np.int32, len(pieces), name)
    while len(pieces) > UNK + 1 and types[-1] == UNUSED and pieces[-1] == _pad(len(pieces) - 1):
        pieces, scores, types = pieces[:-1], scores[:-1], types[:-1]
    for i in np.flatnonzero(types == USER_DEFINED):
        pieces[i] = pieces[i].replace(" ", SPACE)
    exact = fields.get(_EXACT_GGUF) is True
    return build(pieces, scores.tolist(), types.tolist(), name, exact=exact)


def to_gguf(tokenizer: Tokenizer, vocab_size: int | None = None) -> dict[str, Any]:
    """The GGUF metadata with which llama.cpp tokenises as `tokenizer` does.

    Integers stand for UINT32, `scores` is float32 [V] and `token_type` int32 [V]. llama.cpp wants a
    piece for every row of the embedding: where `vocab_size` is more, unused ones follow.
    """
    proto = read(tokenizer)
    control = set(tokenizer.control_ids.values()) - {UNK}
    types = [CONTROL if i in control else piece.type for i, piece in enumerate(proto.pieces)]
    # llama.cpp looks for user-defined pieces before it writes U+2581 for spaces
    tokens = [
        piece.piece.replace(SPACE, " ") if kind == USER_DEFINED else piece.piece
        for piece, kind in zip(proto.pieces, types, strict=True)
    ]
    scores = [piece.score for piece in proto.pieces]
    for i in range(len(tokens), vocab_size or 0):
        tokens.append(_pad(i))
        scores.append(0.0)
        types.append(UNUSED)
    fields = {
        "model": "llama",
        "pre": "default",
        "tokens": tokens,
        "scores": np.array(scores, np.float32),
        "token_type": np.array(types, np.int32),
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "unknown_token_id": UNK,
        "padding_token_id": PAD,
        "add_bos_token": True,
        "add_eos_token": False,
        "add_space_prefix": False,
    }
    others: dict[str, Any] = {_EXACT_GGUF: True} if tokenizer.exact else {}
    if has_turn_pieces(tokenizer):
        fields["eot_token_id"] = END_OF_TURN
        others["tokenizer.chat_template"] = CHAT_TEMPLATE
    return {_KEY + key: value for key, value in fields.items()} | others


def to_hf(tokenizer: Tokenizer, folder: str | Path, *, context: int) -> None:
    """Writes tokenizer.model, tokenizer.json and tokenizer_config.json.

    Args:
      tokenizer: what to write.
      folder: where to.
      context: the most tokens that the model takes.

    Raises:
      UserError: if the tokenizer holds what a list of merges cannot say.
    """
    folder = Path(folder)
    content, config = tokenizer_json.dumps(tokenizer), _tokenizer_config(tokenizer, context)
    files.write_bytes(folder / MODEL_FILE, tokenizer.model)
    files.write_text(folder / tokenizer_json.FILE, content)
    files.write_json(folder / _CONFIG, config)


def from_hf(folder: str | Path) -> Tokenizer:
    """The tokenizer of a Hugging Face folder: tokenizer.model, or else tokenizer.json.

    Raises:
      UserError: if there is none, or one that is not a SentencePiece BPE like Gemma's.
    """
    folder = Path(folder)
    if (folder / MODEL_FILE).exists():
        tokenizer = Tokenizer.load(folder)
        read(tokenizer, str(folder / MODEL_FILE))
        return tokenizer
    path = folder / tokenizer_json.FILE
    if path.exists():
        config = {}
        if (folder / _CONFIG).exists():
            config = files.read_json(folder / _CONFIG, "the tokenizer's settings")
        return tokenizer_json.load(path, exact=config.get(_EXACT_HF) is True)
    raise UserError(
        f"there is neither {MODEL_FILE} nor {path.name} in {folder}; add the model's tokenizer to "
        "the folder."
    )


def _tokenizer_config(tokenizer: Tokenizer, context: int) -> dict[str, Any]:
    pieces = [piece.piece for piece in read(tokenizer).pieces]
    # transformers' GemmaTokenizer adds a <mask> of its own where there is none.
    gemma = "<mask>" in tokenizer.control_ids
    config = {
        "tokenizer_class": "GemmaTokenizer" if gemma else "PreTrainedTokenizerFast",
        "pad_token": pieces[PAD],
        "eos_token": pieces[EOS],
        "bos_token": pieces[BOS],
        "unk_token": pieces[UNK],
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "spaces_between_special_tokens": False,
        "padding_side": "left",
        "model_max_length": context,
    }
    if tokenizer.exact:
        config[_EXACT_HF] = True
    if has_turn_pieces(tokenizer):
        config["chat_template"] = MARKED_CHAT_TEMPLATE
    return config


def _pad(i: int) -> str:
    """The name of a row without a piece, as llama.cpp's own converter gives it."""
    return f"[PAD{i}]"


def _field(fields: Mapping[str, Any], key: str, name: str) -> Any:
    if _KEY + key not in fields:
        raise UserError(
            f"{name} has no {_KEY}{key}, without which its tokenizer cannot be built; import a "
            "file that holds its tokenizer."
        )
    return fields[_KEY + key]


def _numbers(fields: Mapping[str, Any], key: str, dtype: type, count: int, name: str) -> np.ndarray:
    field = _field(fields, key, name)
    try:
        values = np.asarray(field, dtype)
    except (TypeError, ValueError, OverflowError):
        raise UserError(
            f"{name} has {_KEY}{key} that are not numbers; the file is damaged, fetch it anew."
        ) from None
    if not np.isfinite(values).all():
        raise UserError(
            f"{name} has {_KEY}{key} that are not finite; the file is damaged, fetch it anew."
        )
    if values.shape != (count,):
        raise UserError(
            f"{name} has {count} {_KEY}tokens, but {values.size} {_KEY}{key}; the file is damaged, "
            "fetch it anew."
        )
    return values
