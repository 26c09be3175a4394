"""Where documents come from.

A source is a string:
  `stdlib`                     the standard library of the running Python: sources and reference
  `hf:NAME[:CONFIG][:SPLIT]`   a Hugging Face dataset, by name or its folder: a copy of its
                               repository, or what `save_to_disk` wrote
  `some/file.jsonl.xz`         JSON lines, one document a line (`.jsonl`, `.json`, `.ndjson`)
  `some/file.parquet`          one document a row
  `some/file.md`               any other file: UTF-8 text, one document a file
  `some/folder`, `some/*.txt`  all files of known kinds below a folder; the files of a glob
Text and JSON lines may be packed as `.gz`, `.xz`, `.bz2` or `.zst`. The order is fixed: sources as
given, files by name. A document longer than `readers.MAX_DOCUMENT_CHARS` is cut at the last line
break before and goes on as another one, so that memory is bounded whatever the files are.
"""

import glob
import hashlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from gemma_jax import files
from gemma_jax.data import readers
from gemma_jax.errors import UserError
from gemma_jax.progress import progress

_BAR_CHARS = 1 << 18  # of text, between two moves of a bar
_PACKED = 3  # characters that a byte of a packed file gives, about: for the bar alone
_JSON_LINES = (".jsonl", ".json", ".ndjson")
_TEXT_SUFFIXES = frozenset(
    f".{suffix}"
    for suffix in (
        *("txt", "text", "md", "rst", "tex", "org", "adoc", "html", "htm", "xml", "srt", "log"),
        *("py", "pyi", "c", "h", "cc", "cpp", "hpp", "cu", "rs", "go", "java", "kt"),
        *("scala", "js", "ts", "jsx", "tsx", "css", "sh", "sql", "r", "jl", "lua", "pl", "rb"),
        *("php", "swift", "hs", "ml", "el", "lisp", "csv", "tsv", "toml", "yaml", "yml", "ini"),
    )
)


@dataclass(frozen=True)
class Part:
    """One file of a corpus, or one thing that stands for a file.

    Attributes:
      name: what messages and the manifest call it.
      kind: `text`, `jsonl`, `parquet`, `hf` or `stdlib`.
    """

    name: str
    kind: str

    def documents(self, text_field: str) -> Iterator[str]:
        """The texts of this part, in a fixed order; none is empty.

        Raises:
          UserError: with the file, the place and the mend, where something is not as it should be.
        """
        if self.kind == "text":
            yield from readers.cut(readers.text_blocks(self.name))
            return
        for text in self._rows(text_field):
            yield from readers.cut([text])

    def _rows(self, text_field: str) -> Iterator[str]:
        if self.kind == "stdlib":
            return readers.stdlib_texts()
        if self.kind == "hf":
            return readers.hf_texts(self.name, text_field)
        if self.kind == "parquet":
            return readers.parquet_texts(self.name, text_field)
        return readers.json_texts(self.name, text_field)

    def size(self) -> int:
        """Bytes of the file; 1 where it is none."""
        if self.kind in ("stdlib", "hf"):
            return 1
        with readers.reading(self.name):
            return Path(self.name).stat().st_size

    def is_packed(self) -> bool:
        return self.kind == "parquet" or Path(self.name).suffix.lower() in readers.OPENERS

    def identity(self) -> dict[str, Any]:
        """What the manifest keeps of it, to tell later whether it is still the same."""
        if self.kind == "stdlib":
            digest = hashlib.sha256()
            for text in readers.stdlib_texts():
                digest.update(text.encode())
            return {
                "name": "stdlib",
                "python": sys.version.split()[0],
                "sha256": digest.hexdigest(),
            }
        if self.kind == "hf":
            dataset = readers.hf_dataset(self.name)
            return {
                "name": self.name,
                "documents": len(dataset),
                "fingerprint": str(getattr(dataset, "_fingerprint", "")),
            }
        with readers.reading(self.name):
            stat = Path(self.name).stat()
            sha256 = files.file_hash(self.name)
        return {
            "name": self.name,
            "size": stat.st_size,
            "mtime_ns": stat.st_mtime_ns,
            "sha256": sha256,
        }

    def is_still(self, identity: dict[str, Any]) -> bool:
        """Whether it is what `identity` was taken from; reads it only where the time differs."""
        if self.kind == "hf" and not Path(self.name.split(":")[1]).is_dir():
            return True  # asking the hub each time would need a network
        if self.kind == "hf":
            return self.identity() == identity
        if self.kind == "stdlib":
            return self.identity() == identity
        with readers.reading(self.name):
            stat = Path(self.name).stat()
            if stat.st_size != identity["size"]:
                return False
            same_time = stat.st_mtime_ns == identity["mtime_ns"]
            return same_time or files.file_hash(self.name) == identity["sha256"]


def find_parts(sources: tuple[str, ...]) -> list[Part]:
    """Resolves sources to parts.

    Raises:
      UserError: if a source names nothing that is there.
    """
    if not sources:
        raise UserError('a corpus needs at least one source; give files, a folder or "stdlib".')
    return [part for source in sources for part in _resolve(source)]


class Document(NamedTuple):
    """A text, and the name of the part that it comes from."""

    text: str
    part: str


def iter_documents(
    sources: tuple[str, ...], text_field: str = "text", *, show_progress: bool = False
) -> Iterator[Document]:
    """All documents of `sources` in their fixed order, read as they are asked for."""
    return read_parts(find_parts(sources), text_field, show_progress=show_progress)


def read_parts(
    parts: Sequence[Part], text_field: str, *, show_progress: bool
) -> Iterator[Document]:
    """The documents of `parts`, with a bar over the bytes of the files where wanted."""
    sizes = [part.size() for part in parts]
    with progress("look through", sum(sizes), quiet=not show_progress) as advance:
        for part, size in zip(parts, sizes, strict=True):
            left, read = size, 0
            for text in part.documents(text_field):
                yield Document(text, part.name)
                read += len(text)
                if read >= _BAR_CHARS:
                    step = min(read // (_PACKED if part.is_packed() else 1), left)
                    left, read = left - step, 0
                    advance(step, part.name)
            advance(left, part.name)


def _resolve(source: str) -> list[Part]:
    if source == "stdlib":
        return [Part("stdlib", "stdlib")]
    if source.startswith("hf:"):
        return [Part(source, "hf")]
    path = Path(source).expanduser()
    if path.is_file():
        return [Part(str(path), _kind(path) or "text")]
    if path.is_dir():
        # A .json file in a folder is settings more often than it is documents.
        below = sorted(
            p for p in path.rglob("*") if _kind(p) and p.suffix != ".json" and p.is_file()
        )
        visible = [p for p in below if not any(n[0] == "." for n in p.relative_to(path).parts)]
        if not visible:
            raise UserError(
                f"the folder {source} holds no text, JSON-lines or Parquet files; name a folder "
                "that does, or the files themselves."
            )
        return [Part(str(p), _kind(p) or "text") for p in visible]
    if glob.has_magic(source):
        found = sorted(p for p in glob.glob(str(path), recursive=True) if Path(p).is_file())
        if not found:
            raise UserError(f"the pattern {source} matches no file; check it (** goes deeper).")
        return [Part(p, _kind(Path(p)) or "text") for p in found]
    raise UserError(
        f"the source {source} does not exist; give a file, a folder, a glob, hf:NAME or stdlib."
    )


def _kind(path: Path) -> str | None:
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] in readers.OPENERS:
        suffixes.pop()
    last = suffixes[-1] if suffixes else ""
    if last in _JSON_LINES:
        return "jsonl"
    if last == ".parquet":
        return "parquet"
    return "text" if last in _TEXT_SUFFIXES else None
