"""Sources: what each kind gives, in which order, and what is refused with which words."""

import contextlib
import gzip
import json
import lzma
import sys
import types

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from gemma_jax.data import corpora, readers
from gemma_jax.data.corpora import find_parts, iter_documents
from gemma_jax.errors import UserError


def texts(*sources, **options) -> list[str]:
    return [document.text for document in iter_documents(tuple(map(str, sources)), **options)]


def lines(*rows) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def test_text_files_keep_every_byte(tmp_path) -> None:
    raw = "\ufeffone\r\ntwo \u2581 é\n\n".encode()
    (tmp_path / "a.txt").write_bytes(raw)
    assert [text.encode() for text in texts(tmp_path / "a.txt")] == [raw]


def test_folders_and_globs_come_by_name(tmp_path) -> None:
    for name in ("b.md", "a.txt", "sub/c.py", ".hidden/d.txt", "e.bin", "settings.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert texts(tmp_path) == ["a.txt", "b.md", "sub/c.py"]
    assert texts(tmp_path / "*.md", tmp_path / "**/*.py") == ["b.md", "sub/c.py"]


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz", ".zst"])
def test_json_lines_packed_or_not(tmp_path, suffix: str) -> None:
    pack = {
        "": bytes,
        ".gz": gzip.compress,
        ".xz": lzma.compress,
        ".zst": zstandard.ZstdCompressor().compress,
    }[suffix]
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(pack(lines({"text": "one\n"}, {"text": ""}, {"text": "two é"}) + b"\n"))
    assert texts(path) == ["one\n", "two é"]
    if suffix:
        path.write_bytes(path.read_bytes()[:-6])
        with pytest.raises(UserError, match="damaged or cut short"):
            texts(path)


def test_the_bar_moves_within_a_file(tmp_path, monkeypatch) -> None:
    """It ends at the size of all files, packed or not, and never goes past it on the way."""
    moves = []

    @contextlib.contextmanager
    def bar(label, total, quiet):
        yield lambda units, note: moves.append((units, note))
        assert sum(units for units, _ in moves) == total

    monkeypatch.setattr(corpora, "progress", bar)
    monkeypatch.setattr(corpora, "_BAR_CHARS", 10)
    (tmp_path / "a.jsonl").write_bytes(lines(*[{"text": "twelve chars"}] * 5))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines(*[{"text": "x" * 90}] * 50)))
    assert len(texts(tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz", show_progress=True)) == 55
    assert [units for units, name in moves if name.endswith("a.jsonl")][:5] == [12] * 5
    assert all(units >= 0 for units, _ in moves)


def test_parquet(tmp_path) -> None:
    table = pyarrow.table({"body": ["one", None, "two"], "n": [1, 2, 3]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert texts(tmp_path / "a.parquet", text_field="body") == ["one", "two"]
    with pytest.raises(UserError, match=r'no column "text".*body, n'):
        texts(tmp_path / "a.parquet")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(UserError, match="not a sound Parquet file"):
        texts(tmp_path / "a.parquet")


def test_standard_library_is_there_and_repeatable() -> None:
    found = texts("stdlib")
    assert len(found) > 300
    assert sum(map(len, found)) > 5_000_000
    assert any("class JSONDecoder" in text for text in found)
    assert any(text.startswith('The "assert" statement') for text in found), "the reference"
    (part,) = find_parts(("stdlib",))
    assert part.identity() == part.identity()


def test_long_documents_are_cut_at_line_breaks(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(readers, "MAX_DOCUMENT_CHARS", 10)
    text = "aé\nbb\nccc\n" + "d" * 25 + "\nend"
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "a.jsonl").write_bytes(lines({"text": text}))
    for name in ("a.txt", "a.jsonl"):
        parts = texts(tmp_path / name)
        assert "".join(parts) == text
        assert max(map(len, parts)) <= 10
    assert parts[0] == "aé\nbb\nccc\n"


def test_text_that_is_not_utf8_is_refused_by_place(tmp_path, monkeypatch) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("é".encode() * 5 + b"ok \xff more")
    for block in (1 << 18, 1, 3):
        monkeypatch.setattr(readers, "_READ_BYTES", block)
        with pytest.raises(UserError, match=r"a\.txt is not UTF-8 at byte 13 \(0xff\).*iconv"):
            texts(path)
    path.write_bytes(b"cut \xe2\x96")
    with pytest.raises(UserError, match="not UTF-8 at byte 4"):
        texts(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "x"', r"a\.jsonl line 3 is not JSON"),
        (b'{"body": "x", "n": 1}', r'line 3 has no text under "text" \(it has: body, n\)'),
        (b'["x"]', r"line 3 has no text .*list"),
        (b'{"text": "\xff"}', "line 3 is not UTF-8 at byte 10 of the line"),
        (b'{"n": ' + b"1" * 5000 + b"}", "line 3 holds a number of thousands of digits"),
        (b"[" * 200_000, "line 3 .* is nested too deeply"),
        (b'{"text": "\\ud800"}', "line 3 holds half a surrogate pair at character 0"),
    ],
)
def test_broken_lines_are_refused_by_number(tmp_path, line: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines({"text": "one"}) + b"\n" + line + b"\n")
    with pytest.raises(UserError, match=message):
        texts(tmp_path / "a.jsonl")


def test_sources_that_are_not_there_are_refused(tmp_path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        texts(tmp_path / "absent.txt")
    with pytest.raises(UserError, match="matches no file"):
        texts(tmp_path / "*.txt")
    with pytest.raises(UserError, match="holds no text"):
        texts(tmp_path)
    with pytest.raises(UserError, match="at least one source"):
        texts()


class Dataset:
    """A stand-in for that of the package `datasets`, which is an optional one."""

    column_names = ("text", "label")

    def __init__(self, split="train", fingerprint="f00"):
        self.split, self._fingerprint = split, fingerprint

    def select_columns(self, names):
        assert names == ["text"]
        return [{"text": "one"}, {"text": None}, {"text": "two"}]

    def __len__(self):
        return 3


@pytest.fixture
def package(monkeypatch):
    class DatasetDict(dict): ...

    package = types.ModuleType("datasets")
    package.DatasetDict = DatasetDict
    package.load_from_disk = lambda path: DatasetDict(train=Dataset(), test=Dataset())
    package.load_dataset = lambda name, config, split: [Dataset()][name != "some/name"]
    monkeypatch.setitem(sys.modules, "datasets", package)
    return package


def test_hugging_face_dataset(tmp_path, package, monkeypatch) -> None:
    for source in ("hf:some/name", "hf:some/name:config:train", f"hf:{tmp_path}:test"):
        assert texts(source) == ["one", "two"]
    assert find_parts(("hf:some/name",))[0].identity()["fingerprint"] == "f00"
    with pytest.raises(UserError, match=r'no split "valid" \(it has: train, test\)'):
        texts(f"hf:{tmp_path}:valid")
    with pytest.raises(UserError, match="cannot be loaded"):
        texts("hf:other")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"GEMMA_JAX_EXTRA=cpu,hf"):
        texts("hf:some/name")


def test_hugging_face_folders(tmp_path, package) -> None:
    """One dataset alone has the split that it was taken from; what `save_to_disk` did not write is
    a copy of a repository; and a folder that has changed is not still the same."""
    package.load_from_disk = lambda path: Dataset("test")
    assert texts(f"hf:{tmp_path}") == texts(f"hf:{tmp_path}:test") == ["one", "two"]
    with pytest.raises(UserError, match=r'the split "train" .*one dataset alone \(split: test\)'):
        texts(f"hf:{tmp_path}:train")
    (part,) = find_parts((f"hf:{tmp_path}",))
    identity = part.identity()
    assert part.is_still(identity)
    package.load_from_disk = lambda path: Dataset("test", "f01")
    assert not part.is_still(identity)

    def refuse(path):
        raise FileNotFoundError

    package.load_from_disk = refuse
    package.load_dataset = lambda name, config, split: Dataset(split, name)
    assert find_parts((f"hf:{tmp_path}:test",))[0].identity()["fingerprint"] == str(tmp_path)
