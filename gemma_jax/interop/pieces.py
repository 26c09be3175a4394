"""The pieces of a SentencePiece model: where foreign tokenizers come from and end in."""

from collections.abc import Sequence

from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec

from gemma_jax.data.tokenizer import BOS, CONTROL_NAME, EOS, PAD, UNK, Tokenizer, mark_exact
from gemma_jax.errors import UserError

# The types of pieces have the same numbers in SentencePiece and in llama.cpp.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


def build(
    pieces: Sequence[str],
    scores: Sequence[float],
    types: Sequence[int],
    name: str,
    *,
    exact: bool = False,
) -> Tokenizer:
    """A tokenizer of these pieces; Gemma's control pieces above UNK become user-defined ones.

    `exact`: see `Tokenizer`; SentencePiece's way unless the file says that it was trained here.
    """
    name = f"the tokenizer of {name}"
    _check_pieces(pieces, types, name)
    proto = ModelProto()
    spec = proto.trainer_spec
    spec.model_type = TrainerSpec.BPE
    spec.vocab_size = len(pieces)
    spec.byte_fallback = True
    spec.split_digits = True
    spec.allow_whitespace_only_pieces = True
    spec.pad_id, spec.eos_id, spec.bos_id, spec.unk_id = PAD, EOS, BOS, UNK
    spec.pad_piece, spec.eos_piece, spec.bos_piece, spec.unk_piece = pieces[: UNK + 1]
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = False
    proto.normalizer_spec.remove_extra_whitespaces = False
    for i, (piece, score, kind) in enumerate(zip(pieces, scores, types, strict=True)):
        if i == UNK:
            kind = UNKNOWN
        elif i > UNK and kind == CONTROL and CONTROL_NAME.fullmatch(piece):
            kind = USER_DEFINED
        proto.pieces.add(piece=piece, score=score, type=kind)
    if exact:
        mark_exact(proto)
    return Tokenizer(proto.SerializeToString(deterministic=True), name)


def read(tokenizer: Tokenizer, name: str = "the tokenizer") -> ModelProto:
    """The model of a tokenizer, if it is one like Gemma's.

    Raises:
      UserError: if it is no BPE, or its first ids are not Gemma's.
    """
    proto = ModelProto.FromString(tokenizer.model)
    if proto.trainer_spec.model_type != TrainerSpec.BPE:
        raise UserError(
            f"{name} is a SentencePiece model of another kind than BPE, which Gemma 3 has; take a "
            "tokenizer of gemma_jax or of Gemma 3."
        )
    _check_pieces([piece.piece for piece in proto.pieces], [p.type for p in proto.pieces], name)
    return proto


def _check_pieces(pieces: Sequence[str], types: Sequence[int], name: str) -> None:
    if len(pieces) <= UNK:
        raise UserError(
            f"{name} has {len(pieces)} pieces, which is less than the control pieces alone; take "
            "a complete file."
        )
    wrong = [i for i in (PAD, EOS, BOS, UNK) if types[i] not in (CONTROL, UNKNOWN)]
    if wrong:
        raise UserError(
            f"{name} has {pieces[wrong[0]]!r:.40} at id {wrong[0]}, where Gemma 3 has a control "
            "piece (pad, eos, bos, unk are 0 to 3); take a tokenizer of gemma_jax or of Gemma 3."
        )
    seen: set[str] = set()
    for i, (piece, kind) in enumerate(zip(pieces, types, strict=True)):
        if not piece or piece in seen or not _is_unicode(piece):
            what = f"{piece!r:.40} twice, again" if piece in seen else f"the piece {piece!r:.40}"
            raise UserError(f"{name} has {what} at id {i}; the file is damaged, fetch it anew.")
        if not NORMAL <= kind <= BYTE or (kind == UNKNOWN and i != UNK):
            raise UserError(
                f"{name} gives {piece!r:.40} at id {i} the type {kind}, which no piece of Gemma 3 "
                "has there; take a tokenizer of gemma_jax or of Gemma 3."
            )
        seen.add(piece)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate
        return False
    return True
