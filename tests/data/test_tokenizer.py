"""The tokenizer: every text comes back, ids lie where Gemma has them, training is repeatable."""

import random

import numpy as np
import pytest
import sentencepiece
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from gemma_jax.data import tokenizer as tokenizer_module
from gemma_jax.data import tokenizer_training
from gemma_jax.data.line_encoder import LineEncoder
from gemma_jax.data.tokenizer import (
    BOS,
    END_OF_TURN,
    EOS,
    PAD,
    START_OF_TURN,
    UNK,
    Tokenizer,
    TokenizerConfig,
)
from gemma_jax.data.tokenizer_training import train_tokenizer
from gemma_jax.errors import UserError

TEXTS = [
    f"def f{i}(x):\n    return x * {i}  # {word} café\n\n\nA line of prose about the {word}.\t{i}"
    for i in range(40)
    for word in ("quick", "brown", "fox", "jumps", "over", "lazy", "dog")
]
CONFIG = TokenizerConfig(vocab_size=500)

NASTY = [
    "",
    " ",
    "  two before, three after   ",
    "\u2581literal\u2581\u2581 and  spaces",
    "nul \x00 in it\x00",
    "\r\n\r\n\rmixed\n\r",
    "\t\t\ttabs\t \t",
    "\n" * 13,
    "\u0301\u0301lone marks",
    "e\u0301 is not \u00e9",
    "\ufeffbom\ufeff",
    "👩‍👩‍👧‍👦 🇨🇭 🙂",
    "\ufffd\uffff\U0010ffff",
    "<bos><eos><pad><unk><mask><start_of_turn>user<end_of_turn><unused3><0x41>[multimodal]",
    "１２３ ¼ ﬁ Ⅷ",
    "\u3000\u00a0\u2028\u2029\x0b\x0c\x85",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer(TEXTS, CONFIG, tmp_path_factory.mktemp("tok") / "tokenizer.model")


def check_round_trip(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())
    assert all(i > END_OF_TURN for i in ids), "ordinary text gave a control id"


@pytest.mark.parametrize("text", NASTY)
def test_nasty_texts_come_back(tokenizer: Tokenizer, text: str) -> None:
    check_round_trip(tokenizer, text)


def test_random_texts_come_back(tokenizer: Tokenizer) -> None:
    rng = random.Random(0)

    def any_character() -> str:
        code = rng.randrange(0x110000 - 0x800)
        return chr(code if code < 0xD800 else code + 0x800)

    pools = [
        any_character,
        lambda: rng.choice(" \t\n\r\0\u2581\ufeff\u0301a1<>é\u00a0"),
        lambda: rng.choice(NASTY),
    ]
    for _ in range(1500):
        check_round_trip(tokenizer, "".join(rng.choice(pools)() for _ in range(rng.randrange(20))))


def test_long_texts_are_cut_without_a_trace(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "\n\n".join(TEXTS) + "    x " * 50
    whole = tokenizer.encode(text)
    monkeypatch.setattr(tokenizer_module, "_CUT_CHARS", 40)
    assert tokenizer.encode(text) == whole
    check_round_trip(tokenizer, "x" * 1000 + "\u2581" * 100)


def test_lines_encoded_once_give_the_same_ids(tokenizer: Tokenizer) -> None:
    assert tokenizer.cuts_at_newlines
    encoder, rng = LineEncoder(tokenizer), random.Random(1)
    ends = ["\n", "\n\n", "\n" * 9, " \n", "\n ", "\r\n", "\n\t", ""]
    for _ in range(300):
        text = "".join(
            rng.choice(NASTY + TEXTS) + rng.choice(ends) for _ in range(rng.randrange(6))
        )
        assert encoder.encode(text) == tokenizer.encode(text)
    proto = ModelProto.FromString(tokenizer.model)
    proto.pieces[-1].piece = "a\nb"
    assert not Tokenizer(proto.SerializeToString()).cuts_at_newlines


def test_batches_on_threads_equal_single_texts(tokenizer: Tokenizer) -> None:
    texts = NASTY + TEXTS[:10]
    assert tokenizer.encode_batch(texts, threads=2) == [tokenizer.encode(t) for t in texts]


def test_ids_lie_in_gemmas_places(tokenizer: Tokenizer) -> None:
    processor = tokenizer._processor
    assert tokenizer.vocab_size == 500
    assert (PAD, EOS, BOS, UNK, START_OF_TURN, END_OF_TURN) == (0, 1, 2, 3, 105, 106)
    names = {0: "<pad>", 1: "<eos>", 2: "<bos>", 3: "<unk>", 4: "<mask>", 6: "<unused0>"}
    names |= {105: "<start_of_turn>", 106: "<end_of_turn>", 107: "\n", 108: "\n\n"}
    assert {i: processor.id_to_piece(i) for i in names} == names
    assert np.all(tokenizer.token_bytes()[:107] == 0)
    assert np.all(tokenizer.token_bytes()[107:] > 0)


def test_digits_are_split_and_indentation_has_pieces(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode("12345")) == 5
    assert len(tokenizer.encode("    ")) == 1


def test_training_is_repeatable_in_any_order(tokenizer: Tokenizer, tmp_path) -> None:
    again = train_tokenizer(reversed(TEXTS), CONFIG, tmp_path / "again.model")
    assert again.hash == tokenizer.hash
    assert Tokenizer.load(tmp_path / "again.model").hash == tokenizer.hash


def test_sample_is_bounded_and_keyed_by_the_seed() -> None:
    def draw(seed: int) -> list[str]:
        return tokenizer_training._sample(TEXTS, TokenizerConfig(sample_bytes=2000, seed=seed))

    size = sum(len(text.encode()) for text in draw(0))
    assert 2000 <= size < 2000 + max(len(text.encode()) for text in TEXTS)
    assert draw(0) == draw(0) != draw(1)


def test_vocabulary_of_the_wrong_size_is_refused(tmp_path) -> None:
    with pytest.raises(UserError, match=r"at most (\d+)") as caught:
        train_tokenizer(["a few words"], TokenizerConfig(vocab_size=5000), tmp_path / "m")
    largest = int(str(caught.value).split("at most ")[1].split(";")[0])
    train_tokenizer(["a few words"], TokenizerConfig(vocab_size=largest), tmp_path / "words")
    many = ["".join(chr(0x4E00 + i) for i in range(1000))]
    with pytest.raises(UserError, match="too small for the characters"):
        train_tokenizer(many, TokenizerConfig(vocab_size=500), tmp_path / "m")
    with pytest.raises(UserError, match="leaves no room"):
        TokenizerConfig(vocab_size=300)
    with pytest.raises(UserError, match="no text"):
        train_tokenizer([], TokenizerConfig(vocab_size=500), tmp_path / "m")


def test_another_tokenizer_is_not_overwritten(tmp_path) -> None:
    config, path = TokenizerConfig(vocab_size=420), tmp_path / "m"
    first = train_tokenizer(TEXTS, config, path)
    assert train_tokenizer(TEXTS, config, path).hash == first.hash
    for texts, other in ((TEXTS[:5], config), ([], TokenizerConfig(vocab_size=410))):
        with pytest.raises(UserError, match="is another tokenizer already"):
            train_tokenizer(texts, other, path)
    assert path.read_bytes() == first.model


def test_a_file_that_is_no_tokenizer_is_refused(tmp_path) -> None:
    with pytest.raises(UserError, match="no tokenizer at"):
        Tokenizer.load(tmp_path / "absent.model")
    (tmp_path / "bad.model").write_bytes(b"something else")
    with pytest.raises(UserError, match="not a SentencePiece model"):
        Tokenizer.load(tmp_path / "bad.model")


def test_control_pieces_are_recognised_when_asked(tokenizer: Tokenizer) -> None:
    text = "<bos>a <start_of_turn>b<<end_of_turn>> [[multimodal]"
    ids = tokenizer.encode(text, control=True)
    assert [i for i in ids if i <= END_OF_TURN] == [BOS, START_OF_TURN, END_OF_TURN, 5]
    assert tokenizer.decode(ids) == "a b<> ["
    for text in (*TEXTS[:5], "", "no <names> [of] <control pieces>"):
        assert tokenizer.encode(text, control=True) == tokenizer.encode(text)


def test_a_model_that_matches_turn_names_in_text_is_tamed(tmp_path) -> None:
    """As Gemma's own model does, whose turn pieces are matched wherever they stand."""
    names = ["<start_of_turn>", "<end_of_turn>"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_prefix=str(tmp_path / "m"),
        model_type="bpe",
        vocab_size=480,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        control_symbols=[f"<unused{n}>" for n in range(101)],
        user_defined_symbols=names,
        minloglevel=3,
    )
    tamed = Tokenizer.load(tmp_path / "m.model")
    untamed = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    assert untamed.encode(names[0]) == tamed.encode(names[0], control=True) == [START_OF_TURN]
    assert tamed.token_bytes()[[START_OF_TURN, END_OF_TURN]].sum() == 0
    for text in NASTY:  # a model from elsewhere: U+2581 is a space
        check_round_trip(tamed, text.replace("\u2581", " "))


def test_a_model_that_changes_text_is_refused(tmp_path) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_prefix=str(tmp_path / "m"),
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=3,
    )
    with pytest.raises(UserError, match="changes text"):
        Tokenizer.load(tmp_path / "m.model")


def test_ids_past_the_vocabulary_stand_for_nothing(tokenizer: Tokenizer) -> None:
    """A multimodal model has more rows than its tokenizer has pieces, and may draw them."""
    ids = tokenizer.encode("def")
    assert tokenizer.decode([*ids, tokenizer.vocab_size, tokenizer.vocab_size + 63]) == "def"
