"""Tokenizers in and out: equal ids and texts on every path, and those of transformers.

`tests/goldens/tokenizers.json` holds what transformers gives on our export of the tiny tokenizer,
and on Google's own files for the real one.
"""

import hashlib
import io
import json
import random
from pathlib import Path

import numpy as np
import pytest
import real_files
import sentencepiece
from goldens.tokenizer_cases import CHATS, CONTROL_TEXTS, SPACE_MARKS, TEXTS
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from gemma_jax.data import tokenizer as tokenizer_module
from gemma_jax.data.chat import encode_chat
from gemma_jax.data.tokenizer import END_OF_TURN, START_OF_TURN, Tokenizer
from gemma_jax.errors import UserError
from gemma_jax.interop.gguf_file import GgufFile
from gemma_jax.interop.tokenizers import from_gguf, from_hf, to_gguf, to_hf

GOLDENS = Path(__file__).parent.parent / "goldens"
IDS = json.loads((GOLDENS / "tokenizers.json").read_text())
UNUSUAL = [*TEXTS, *CONTROL_TEXTS, *SPACE_MARKS, "<unk><image_soft_token><unused99>"]
KEY, EXACT = "tokenizer.ggml.", "gemma_jax.exact_tokenizer"


@pytest.fixture(scope="module")
def tiny() -> Tokenizer:
    return Tokenizer.load(GOLDENS / "tokenizer_tiny.model")


@pytest.fixture(scope="module")
def real() -> Tokenizer:
    return from_gguf(GgufFile(real_files.MODEL).fields, "gemma.gguf")


def check_equal(a: Tokenizer, b: Tokenizer) -> None:
    assert a.vocab_size == b.vocab_size
    assert a.exact == b.exact
    for text in UNUSUAL:
        ids = a.encode(text)
        assert b.encode(text) == ids, text
        kept = text if a.exact else text.replace("\u2581", " ")
        assert a.decode(ids) == b.decode(ids) == kept
        assert a.encode(text, control=True) == b.encode(text, control=True)
    assert np.array_equal(a.token_bytes(), b.token_bytes())
    assert a.control_ids == b.control_ids


def check_goldens(tokenizer: Tokenizer, name: str) -> None:
    assert tokenizer.encode_batch(TEXTS) == IDS[name]["texts"]
    assert [tokenizer.encode(text, control=True) for text in CONTROL_TEXTS] == (
        IDS[name]["control_texts"]
    )


def check_reads_as_sentencepiece(tokenizer: Tokenizer) -> None:
    """On texts with a literal U+2581, which it takes for a space."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)
    rng = random.Random(0)
    parts = ["\u2581", "\u2581", "\u2581" * 5, " ", "   ", "a", "the", "\n", "\t", "1", "é", "🙂"]
    parts += ["\u0301", "\x00", "<", "<h1>", "\u2582", "\ufffd", "ing", "."]
    drawn = ["".join(rng.choices(parts, k=rng.randrange(12))) for _ in range(2000)]
    texts = [*SPACE_MARKS, *TEXTS, *drawn]
    assert not tokenizer.exact
    assert tokenizer.encode_batch(texts) == processor.encode(texts)
    for text in SPACE_MARKS:
        ids = tokenizer.spell(text)
        assert tokenizer.decode(ids) == text
        assert ("\u2581" in text) == (ids != tokenizer.encode(text)), text


def from_json(folder: Path) -> Tokenizer:
    (folder / "tokenizer.model").unlink()
    return from_hf(folder)


def test_gguf_there_and_back(tiny: Tokenizer) -> None:
    check_equal(tiny, from_gguf(to_gguf(tiny), "a.gguf"))


def test_a_foreign_tokenizer_reads_as_sentencepiece(
    tiny: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what was trained here stays exact, in files that say so."""
    assert tiny.exact
    assert tiny.decode(tiny.encode("\u2581a")) == "\u2581a"
    fields = to_gguf(tiny)
    ours = from_gguf(fields, "a.gguf")
    assert fields.pop(EXACT) is True
    foreign = from_gguf(fields, "a.gguf")
    assert foreign.hash != ours.hash
    check_reads_as_sentencepiece(foreign)
    check_equal(foreign, from_gguf(to_gguf(foreign), "a.gguf"))
    to_hf(foreign, tmp_path, context=512)
    check_equal(foreign, from_hf(tmp_path))
    check_equal(foreign, from_json(tmp_path))
    processor = sentencepiece.SentencePieceProcessor(model_proto=foreign.model)
    long = "x".join(SPACE_MARKS * 20)
    monkeypatch.setattr(tokenizer_module, "_CUT_CHARS", 50)  # long texts are cut
    assert foreign.encode(long) == processor.encode(long)


def test_rows_without_a_piece_are_unused_pieces(tiny: Tokenizer) -> None:
    fields = to_gguf(tiny, 700)
    assert len(fields[KEY + "tokens"]) == len(fields[KEY + "scores"]) == 700
    assert fields[KEY + "token_type"][640:].tolist() == [5] * 60
    assert from_gguf(fields, "a.gguf").hash == from_gguf(to_gguf(tiny), "a.gguf").hash


def test_gguf_says_what_llama_cpp_needs(tiny: Tokenizer) -> None:
    fields = to_gguf(tiny)
    types = fields[KEY + "token_type"]
    assert types[:4].tolist() == [3, 3, 3, 2]
    assert set(types[4:107].tolist()) == {3}
    assert set(types[107:115].tolist()) == {4}
    assert set(types[115:371].tolist()) == {6}
    assert set(types[371:].tolist()) == {1}
    assert fields[KEY + "scores"].dtype == np.float32
    assert fields[KEY + "add_space_prefix"] is False
    assert fields[KEY + "eot_token_id"] == END_OF_TURN
    assert "<start_of_turn>" in fields["tokenizer.chat_template"]


def test_hf_there_and_back(tiny: Tokenizer, tmp_path: Path) -> None:
    to_hf(tiny, tmp_path, context=512)
    assert from_hf(tmp_path).hash == tiny.hash
    again = from_json(tmp_path)
    check_equal(tiny, again)
    assert again.hash == from_gguf(to_gguf(tiny), "a.gguf").hash
    (tmp_path / "tokenizer_config.json").unlink()
    assert not from_hf(tmp_path).exact


def test_merges_as_strings_are_read(tiny: Tokenizer, tmp_path: Path) -> None:
    to_hf(tiny, tmp_path, context=512)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"]["merges"] = [" ".join(merge) for merge in content["model"]["merges"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    check_equal(tiny, from_json(tmp_path))


def test_transformers_gives_our_ids(tiny: Tokenizer, tmp_path: Path) -> None:
    """The goldens hold for this very export: make them anew where it changes."""
    to_hf(tiny, tmp_path, context=512)
    written = (tmp_path / "tokenizer.json").read_bytes()
    assert hashlib.sha256(written).hexdigest() == IDS["tiny"]["sha256"]
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["chat_template"] == IDS["tiny"]["chat_template"]
    assert config["model_max_length"] == 512
    check_goldens(tiny, "tiny")


def test_gemmas_whitespace_and_control_pieces(tiny: Tokenizer, tmp_path: Path) -> None:
    """As in the real vocabulary: runs of spaces and tags are user-defined, control pieces lie
    behind the others too."""
    fields = to_gguf(tiny)
    run = " " * 25
    extra = {run: 4, run + " ": 4, "<table>": 4}
    extra |= {"<unused99>": 3, "<start_of_image>": 4, "<other>": 3}
    fields[KEY + "tokens"] = [*fields[KEY + "tokens"], *extra]
    fields[KEY + "scores"] = [*fields[KEY + "scores"], *[-1000.0] * len(extra)]
    fields[KEY + "token_type"] = [*fields[KEY + "token_type"], *extra.values()]
    tokenizer = from_gguf(fields, "a.gguf")
    size = tiny.vocab_size
    assert tokenizer.encode(run + " <table>") == [size + 1, size + 2]
    assert tokenizer.decode(range(size + 1, size + 6)) == run + " <table>"
    names = "<unused99><start_of_image><other>"
    assert max(tokenizer.encode(names)) < size
    assert tokenizer.encode(names, control=True) == [size + 3, size + 4, size + 5]
    # As in Google's model, whose names SentencePiece matches itself.
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)
    assert processor.encode("<start_of_turn><end_of_turn><unused99>") == [
        START_OF_TURN,
        END_OF_TURN,
        size + 3,
    ]
    again = to_gguf(tokenizer)
    assert again[KEY + "tokens"] == fields[KEY + "tokens"]
    assert again[KEY + "token_type"].tolist()[size:] == [4, 4, 4, 3, 3, 3]
    check_equal(tokenizer, from_gguf(again, "a.gguf"))
    to_hf(tokenizer, tmp_path, context=512)
    check_equal(tokenizer, from_json(tmp_path))


def test_bad_metadata_is_refused(tiny: Tokenizer) -> None:
    def refused(match: str, **changes: object) -> None:
        fields = to_gguf(tiny) | {KEY + key: value for key, value in changes.items()}
        with pytest.raises(UserError, match=match):
            from_gguf({k: v for k, v in fields.items() if v is not None}, "a.gguf")

    fields = to_gguf(tiny)
    tokens, scores = fields[KEY + "tokens"], fields[KEY + "scores"]
    types = fields[KEY + "token_type"]
    for key in ("model", "tokens", "scores", "token_type", "bos_token_id"):
        refused(rf"a.gguf has no tokenizer.ggml.{key},", **{key: None})
    refused("'gpt2', but Gemma 3 has 'llama'", model="gpt2")
    refused("bos_token_id 1, but Gemma 3's is 2", bos_token_id=1)
    refused("add_space_prefix true", add_space_prefix=True)
    refused("640 tokenizer.ggml.tokens, but 639 tokenizer.ggml.scores", scores=scores[:-1])
    refused("640 tokenizer.ggml.tokens, but 641", token_type=[*types, 1])
    refused("not numbers", scores=["x"] * 640)
    refused("not finite", scores=np.full(640, np.nan))
    refused("twice, again at id 639", tokens=[*tokens[:-1], tokens[-2]])
    refused("the piece '' at id 639", tokens=[*tokens[:-1], ""])
    refused("at id 639; the file is damaged", tokens=[*tokens[:-1], "\ud800"])
    refused("at id 639 the type 9", token_type=[*types[:-1], 9])
    refused("at id 2, where Gemma 3 has a control", token_type=[3, 3, 1, *types[3:]])
    refused("has 2 pieces", tokens=tokens[:2], scores=scores[:2], token_type=types[:2])
    refused("not a SentencePiece model", token_type=np.where(types == 6, 1, types))


def test_other_tokenizers_are_refused(tiny: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"neither tokenizer.model nor tokenizer.json in"):
        from_hf(tmp_path)
    to_hf(tiny, tmp_path, context=512)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.model").unlink()

    def refused(match: str, model: dict | None = None, **changes: object) -> None:
        changed = content | changes | {"model": content["model"] | (model or {})}
        (tmp_path / "tokenizer.json").write_text(json.dumps(changed))
        with pytest.raises(UserError, match=match):
            from_hf(tmp_path)

    merges = content["model"]["merges"]
    refused("its model is Unigram", model={"type": "Unigram"})
    refused("without byte fallback", model={"byte_fallback": False})
    refused("it sets ignore_merges", model={"ignore_merges": True})
    refused("its normalizer", normalizer={"type": "NFC"})
    refused("it cuts the text", pre_tokenizer={"type": "ByteLevel"})
    refused("its ids leave gaps", model={"vocab": content["model"]["vocab"] | {"zzz": 9999}})
    refused("cannot be read", model={"vocab": 5})
    refused("cannot be read", model={"merges": [1]})
    refused("cannot be read", added_tokens=[{}])
    refused("lacks merges", model={"merges": merges[1:]})
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        from_hf(tmp_path)


def test_sentencepiece_models_of_other_kinds_are_refused(tmp_path: Path) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["some words to learn from", "and some more of them"] * 20),
        model_writer=model,
        model_type="unigram",
        vocab_size=300,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        minloglevel=3,
    )
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    with pytest.raises(UserError, match="another kind than BPE"):
        from_hf(tmp_path)
    with pytest.raises(UserError, match="another kind than BPE"):
        to_gguf(Tokenizer(model.getvalue()))


class TestReal:
    pytestmark = real_files.needs_real

    def test_ids_are_googles(self, real: Tokenizer) -> None:
        assert real.vocab_size == 262144
        check_goldens(real, "real")
        processor = sentencepiece.SentencePieceProcessor(model_proto=real.model)
        assert [processor.encode(text) for text in TEXTS] == IDS["real"]["texts"]
        check_reads_as_sentencepiece(real)

    def test_conversations_are_googles(self, real: Tokenizer) -> None:
        for key, prompt in (("chats", False), ("chats_with_prompt", True)):
            ours = [encode_chat(real, chat, add_generation_prompt=prompt) for chat in CHATS]
            assert ours == IDS["real"][key]

    def test_there_and_back(self, real: Tokenizer, tmp_path: Path) -> None:
        again = from_gguf(to_gguf(real), "a.gguf")
        assert again.hash == real.hash
        to_hf(real, tmp_path, context=32768)
        check_equal(real, from_json(tmp_path))

    @real_files.needs_tokenizer
    def test_both_sources_hold_the_same_pieces(self, real: Tokenizer) -> None:
        other = from_hf(real_files.FOLDER)
        check_equal(real, other)
        a, b = (ModelProto.FromString(tokenizer.model).pieces for tokenizer in (real, other))
        assert [(p.piece, p.type) for p in a] == [(p.piece, p.type) for p in b]
