"""Token sets: what a build leaves on disk, that it survives a kill, and what it refuses."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from array_record.python import array_record_module

from gemma_jax.data import readers, shard_writer
from gemma_jax.data.tokenizer import BOS, EOS, Tokenizer, TokenizerConfig
from gemma_jax.data.tokens import Corpus, TokenSet, build_tokens
from gemma_jax.errors import UserError

TEXTS = [f"Document {i}: " + "some words of text, " * (i % 7) + "é\n" for i in range(60)]


def write_corpus(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    """60 documents in about ten shards a split."""
    source = write_corpus(tmp_path / "corpus.jsonl", [*TEXTS, TEXTS[3], ""])
    return Corpus(
        path=str(tmp_path / "set"),
        sources=(source,),
        tokenizer=TokenizerConfig(vocab_size=420),
        valid_fraction=0.2,
        shard_bytes=500,
    )


def contents(folder: str) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in Path(folder).iterdir()}


def decoded(token_set: TokenSet, split: str) -> list[str]:
    found = []
    for ids in token_set.documents(split):
        assert (ids[0], ids[-1]) == (BOS, EOS)
        found.append(token_set.tokenizer.decode(ids.tolist()))
    return found


def test_every_document_once_in_order(corpus: Corpus) -> None:
    token_set = build_tokens(corpus)
    train, valid = decoded(token_set, "train"), decoded(token_set, "valid")
    assert sorted(train + valid) == sorted(TEXTS)
    assert train == [text for text in TEXTS if text in set(train)]
    assert len(valid) >= 12
    assert len(token_set.manifest["splits"]["train"]["shards"]) > 3
    assert token_set.manifest["duplicates_dropped"] == 1
    for split, texts in (("train", train), ("valid", valid)):
        documents = token_set.documents(split)
        counts = token_set.counts(split)
        assert counts["documents"] == len(documents) == len(texts)
        assert counts["tokens"] == sum(map(len, documents)) == documents.lengths.sum()
        assert counts["bytes"] == sum(len(text.encode()) for text in texts)


def test_format_is_as_documented(corpus: Corpus) -> None:
    """A reader that knows docs/formats.md alone."""
    build_tokens(corpus)
    folder = Path(corpus.path)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["format"], manifest["version"]) == ("gemma_jax tokens", 1)
    texts = []
    tokenizer = Tokenizer.load(folder / manifest["tokenizer"]["file"])
    for shard in manifest["splits"]["train"]["shards"]:
        reader = array_record_module.ArrayRecordReader(str(folder / shard["file"]), "")
        lengths = np.fromfile(folder / shard["lengths_file"], "<u4")
        assert len(lengths) == reader.num_records() == shard["documents"]
        for length, record in zip(lengths, reader.read_all(), strict=True):
            ids = np.frombuffer(record, manifest["token_dtype"])
            assert len(ids) == length
            texts.append(tokenizer.decode(ids[1:-1].tolist()))
        reader.close()
    assert set(texts) < set(TEXTS)


def test_random_access_and_pickling(corpus: Corpus) -> None:
    documents = build_tokens(corpus).documents("train")
    numbers = [5, 0, len(documents) - 1, 5]
    for found, number in zip(documents.read(numbers), numbers, strict=True):
        np.testing.assert_array_equal(found, documents[number])
    np.testing.assert_array_equal(documents[-1], documents[len(documents) - 1])
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(documents))[5], documents[5])
    with pytest.raises(IndexError):
        documents[len(documents)]


def test_result_does_not_depend_on_threads_or_batches(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_tokens(corpus, workers=1)
    monkeypatch.setattr(shard_writer, "_BATCH_BYTES", 100)
    other = Corpus(**{**vars(corpus), "path": str(tmp_path / "other")})
    build_tokens(other, workers=3)
    assert contents(corpus.path) == contents(other.path)


def test_second_build_returns_at_once(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build_tokens(corpus)
    monkeypatch.setattr(readers, "json_texts", lambda *_: pytest.fail("the corpus was read again"))
    os.utime(corpus.sources[0])  # another time, the same text
    assert build_tokens(corpus).manifest == first.manifest
    Path(corpus.sources[0]).unlink()  # a finished set needs its sources no more
    assert build_tokens(corpus).manifest == first.manifest


def test_build_goes_on_after_a_kill_at_any_shard(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_tokens(corpus)
    whole = contents(corpus.path)
    folder = Path(corpus.path)

    class Killed(BaseException): ...

    def write_then_die(*args, after: int, calls: list[int]):
        if len(calls) == after:
            raise Killed
        calls.append(1)
        return write_group(*args)

    write_group = shard_writer._write_group
    for after in (0, 1, 4):
        for path in folder.iterdir():
            path.unlink()
        monkeypatch.setattr(
            shard_writer,
            "_write_group",
            lambda *args, a=after, c=[]: write_then_die(*args, after=a, calls=c),
        )
        with pytest.raises(Killed):
            build_tokens(corpus)
        (folder / f"train-{after:05d}.arrayrecord.partial").write_bytes(b"half a shard")
        if after == 4:  # a note without its shard does not count
            (folder / "train-00001.arrayrecord").unlink()
        groups = []

        def count(*args, groups=groups):
            groups.append(args[1])
            return write_group(*args)

        monkeypatch.setattr(shard_writer, "_write_group", count)
        build_tokens(corpus)
        assert contents(corpus.path) == whole
        assert groups[0] == (1 if after == 4 else after)
        assert after == 4 or set(groups).isdisjoint(range(after)), "a finished shard was redone"


@pytest.mark.slow
def test_build_goes_on_after_sigkill(corpus: Corpus, tmp_path: Path) -> None:
    source = write_corpus(
        tmp_path / "big.jsonl", [f"{i} {text * 10}" for i in range(60) for text in TEXTS]
    )
    settings = {**vars(corpus), "sources": (source,), "shard_bytes": 50_000}
    script = f"""if True:
        from gemma_jax.data.tokenizer import TokenizerConfig
        from gemma_jax.data.tokens import Corpus, build_tokens
        build_tokens(Corpus(**{settings!r}), workers=1)
    """
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (Path(corpus.path) / "group-00001.json").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (Path(corpus.path) / "manifest.json").exists()
    build_tokens(Corpus(**settings))
    build_tokens(Corpus(**{**settings, "path": str(tmp_path / "other")}))
    killed, whole = contents(corpus.path), contents(str(tmp_path / "other"))
    assert {k: v for k, v in killed.items() if not k.endswith(".partial")} == whole


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"valid_fraction": 0.5}, r"another valid_fraction \(there 0.2, here 0.5\)"),
        ({"tokenizer": TokenizerConfig(vocab_size=410)}, "vocab_size: there 420, here 410"),
        ({"shard_bytes": 600}, "another shard_bytes"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_another_description_is_refused(
    corpus: Corpus, change: dict, message: str, finished: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if finished:
        build_tokens(corpus)
    else:
        with monkeypatch.context() as patch:
            patch.setattr(shard_writer, "write_shards", lambda *_, **__: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                build_tokens(corpus)
    with pytest.raises(UserError, match=message):
        build_tokens(Corpus(**{**vars(corpus), **change}))


def test_other_text_or_another_tokenizer_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    own = Corpus(**{**vars(corpus), "path": str(tmp_path / "own")})
    other = Corpus(
        **{**vars(own), "path": str(tmp_path / "o"), "tokenizer": TokenizerConfig(vocab_size=430)}
    )
    build_tokens(own)
    build_tokens(other)
    borrowed = Corpus(**{**vars(corpus), "tokenizer": own.path})
    assert build_tokens(borrowed).tokenizer.hash == TokenSet.open(own.path).tokenizer.hash
    with pytest.raises(UserError, match=r"another tokenizer .*sha256: there"):
        build_tokens(Corpus(**{**vars(corpus), "tokenizer": other.path}))
    write_corpus(Path(corpus.sources[0]), TEXTS[:-1])
    with pytest.raises(UserError, match=r"another text of .*corpus\.jsonl"):
        build_tokens(borrowed)
    (Path(own.path) / "tokenizer.model").write_bytes(
        (Path(other.path) / "tokenizer.model").read_bytes()
    )
    with pytest.raises(UserError, match="not the tokenizer that"):
        TokenSet.open(own.path)


def test_damaged_shards_are_refused_by_name(corpus: Corpus) -> None:
    build_tokens(corpus)
    path = Path(corpus.path) / "train-00002.arrayrecord"
    sound = path.read_bytes()
    path.write_bytes(sound[: len(sound) // 2])
    with pytest.raises(UserError, match=r"train-00002\.arrayrecord is damaged \(it has \d+ bytes"):
        TokenSet.open(corpus.path)
    path.write_bytes(bytes([sound[0]]) + bytes(len(sound) - 1))
    with pytest.raises(UserError, match=r"train-00002\.arrayrecord is damaged"):
        list(TokenSet.open(corpus.path).documents("train"))
    path.unlink()
    with pytest.raises(UserError, match="is missing"):
        TokenSet.open(corpus.path)


def test_small_and_empty_corpora(corpus: Corpus, tmp_path: Path) -> None:
    write_corpus(Path(corpus.sources[0]), ["", ""])
    with pytest.raises(UserError, match="has no text: every document is empty"):
        build_tokens(corpus)
    assert not Path(corpus.path).exists(), "nothing is left of a refused build"
    two = {**vars(corpus), "path": str(tmp_path / "two"), "valid_fraction": 0.001}
    write_corpus(Path(corpus.sources[0]), TEXTS[:2])
    token_set = build_tokens(Corpus(**two))
    assert token_set.counts("train")["documents"] == token_set.counts("valid")["documents"] == 1
    write_corpus(Path(corpus.sources[0]), TEXTS[:1] * 2)
    token_set = build_tokens(
        Corpus(**{**two, "path": str(tmp_path / "one"), "tokenizer": two["path"]})
    )
    with pytest.raises(UserError, match=r"valid split .* is empty"):
        token_set.documents("valid")
    with pytest.raises(UserError, match='no split "test"'):
        token_set.documents("test")


def test_bad_settings_are_refused(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="with the comma"):
        Corpus(path="x", sources="stdlib")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="valid_fraction"):
        Corpus(path="x", sources=("stdlib",), valid_fraction=1.0)
    with pytest.raises(UserError, match="no finished token set"):
        TokenSet.open(tmp_path / "absent")
    absent = Corpus(**{**vars(corpus), "sources": (str(tmp_path / "absent.txt"),)})
    with pytest.raises(UserError, match="does not exist"):
        build_tokens(absent)
    assert not Path(corpus.path).exists(), "nothing is left of a refused build"


def test_full_disk_is_one_sentence(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    build_tokens(corpus)
    for path in Path(corpus.path).glob("[mt]*"):
        path.unlink()
    (Path(corpus.path) / "train-00000.arrayrecord.partial").symlink_to("/dev/full")
    with pytest.raises(UserError, match="the disk is full; free some space"):
        build_tokens(corpus)
    (Path(corpus.path) / "train-00000.arrayrecord.partial").unlink()
    assert len(build_tokens(corpus).documents("train"))
