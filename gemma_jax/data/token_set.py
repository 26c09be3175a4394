"""A finished token set on disk: its manifest, its tokenizer, and documents by number.

The layout of the folder and of each record is in docs/formats.md.
"""

import threading
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python import array_record_module

from gemma_jax import buckets, files
from gemma_jax.data.tokenizer import MODEL_FILE, Tokenizer
from gemma_jax.errors import UserError

FORMAT = "gemma_jax tokens"
VERSION = 1
MANIFEST_FILE = "manifest.json"
SPLITS = ("train", "valid")


def token_dtype(vocab_size: int) -> np.dtype:
    """What records hold: little-endian uint16 where the ids fit, else uint32."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


class Documents(Sequence[np.ndarray]):
    """The documents of one split by number, each `[bos] + text + [eos]`.

    Reading is thread-safe. Pickling keeps the paths alone and opens the files anew.

    Attributes:
      lengths: int64 [documents], the number of ids of each.
    """

    def __init__(self, folder: Path, shards: list[dict[str, Any]], dtype: np.dtype):
        self._folder, self._shards, self._dtype = folder, shards, dtype
        for shard in shards:
            _check_size(folder / shard["file"], shard["size"])
            _check_size(folder / shard["lengths_file"], 4 * shard["documents"])
        parts = [np.frombuffer(files.read_bytes(folder / s["lengths_file"]), "<u4") for s in shards]
        self.lengths = np.concatenate(parts or [np.zeros(0, "<u4")]).astype(np.int64)
        self._first = np.cumsum([0] + [s["documents"] for s in shards])
        self._open_readers()

    def _open_readers(self) -> None:
        self._readers: list[Any] = [None] * len(self._shards)
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_readers", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open_readers()

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.read(range(*index.indices(len(self))))
        number = index.__index__()
        if not -len(self) <= number < len(self):
            raise IndexError(f"document {number} of {len(self)}")
        return self.read([number % len(self)])[0]

    def read(self, numbers: Sequence[int] | np.ndarray) -> list[np.ndarray]:
        """The documents `numbers`, each [length], read-only; one request a shard."""
        wanted = np.asarray(numbers, np.int64)
        shard_of = np.searchsorted(self._first, wanted, side="right") - 1
        found: list[Any] = [None] * len(wanted)
        for shard in np.unique(shard_of).tolist():
            places = np.flatnonzero(shard_of == shard)
            records = self._read_shard(shard, (wanted[places] - self._first[shard]).tolist())
            for place, record in zip(places.tolist(), records, strict=True):
                document = np.frombuffer(record, self._dtype)
                if len(document) != self.lengths[wanted[place]]:
                    raise _damaged(self._folder / self._shards[shard]["file"], "a length differs")
                found[place] = document
        return found

    def _read_shard(self, shard: int, positions: list[int]) -> list[bytes]:
        path = self._folder / self._shards[shard]["file"]

        def read() -> list[bytes]:
            with self._lock:
                if self._readers[shard] is None:
                    # Random access: no read-ahead, small buffers.
                    self._readers[shard] = array_record_module.ArrayRecordReader(
                        str(buckets.local(path)),
                        "readahead_buffer_size:0",
                        file_reader_buffer_size=1 << 15,
                    )
            return self._readers[shard].read(positions)

        def reopen() -> None:
            self._readers[shard] = None

        try:
            return files.patiently(read, path, doing="read", before_again=reopen)
        except UserError:
            raise
        except (RuntimeError, ValueError, IndexError) as error:
            raise _damaged(path, str(error).splitlines()[0][:120]) from error


class TokenSet:
    """A tokenised corpus. Made by `gemma_jax.data.tokens.build_tokens`.

    Attributes:
      path: the folder.
      manifest: the parsed manifest.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]):
        self.path, self.manifest = path, manifest

    @classmethod
    def open(cls, path: str | Path) -> "TokenSet":
        """Opens a finished token set and checks the size of every file.

        Raises:
          UserError: if there is none, or a file of it is missing, cut short or of a later format.
        """
        path = buckets.place(path)
        if not (path / MANIFEST_FILE).exists():
            manifest_file = buckets.absolute(path / MANIFEST_FILE)
            raise UserError(
                f"{path} holds no finished token set ({manifest_file} is not "
                "there); build it with `gemma-jax data build`."
            )
        manifest = files.read_json(path / MANIFEST_FILE, "the manifest of a token set")
        if manifest.get("format") != FORMAT:
            raise UserError(f"{path / MANIFEST_FILE} is not the manifest of a token set.")
        if manifest.get("version") != VERSION:
            raise UserError(
                f"{path} is of token format {manifest.get('version')}, this version reads "
                f"{VERSION}; build it again."
            )
        fields = {"token_dtype", "tokenizer", "description", "sources", "splits"}
        if missing := sorted(fields - manifest.keys()):
            raise UserError(
                f"{path / MANIFEST_FILE} does not say {missing[0]}; copy it again, or delete the "
                "folder and build it again."
            )
        token_set = cls(path, manifest)
        if token_set.tokenizer.hash != manifest["tokenizer"]["sha256"]:
            raise UserError(
                f"{path / MODEL_FILE} is not the tokenizer that {path} was built with; put the old "
                "file back, or delete the folder and build it again."
            )
        for split in SPLITS:
            token_set._documents(split)
        return token_set

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.path / MODEL_FILE)

    def counts(self, split: str) -> dict[str, int]:
        """`documents`, `tokens` (with BOS and EOS) and `bytes` (UTF-8 of the text) of a split."""
        entry = self.manifest["splits"][split]
        return {key: entry[key] for key in ("documents", "tokens", "bytes")}

    def documents(self, split: str) -> Documents:
        """Random access to a split.

        Raises:
          UserError: if there is no such split, or nothing in it.
        """
        if split not in SPLITS:
            raise UserError(f'there is no split "{split}"; choose one of {", ".join(SPLITS)}.')
        documents = self._documents(split)
        if not len(documents):
            raise UserError(
                f"the {split} split of {self.path} is empty; build it from more documents or with "
                "another valid_fraction."
            )
        return documents

    def _documents(self, split: str) -> Documents:
        cache = self.__dict__.setdefault("_opened", {})
        if split not in cache:
            dtype = np.dtype(self.manifest["token_dtype"])
            cache[split] = Documents(self.path, self.manifest["splits"][split]["shards"], dtype)
        return cache[split]


def _check_size(path: Path, size: int) -> None:
    if not path.exists():
        raise _damaged(path, "it is missing")
    if (found := buckets.size(path)) != size:
        raise _damaged(path, f"it has {found} bytes in place of {size}")


def _damaged(path: Path, what: str) -> UserError:
    return UserError(
        f"{path} is damaged ({what}); copy it again, or delete the folder {path.parent} and build "
        "the token set again."
    )
