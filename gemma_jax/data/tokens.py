"""From a corpus to a token set: one description, one folder, one call.

Two passes over the documents. The first looks at everything (so that bad input is refused before
work is lost), counts, and trains the tokenizer; the second tokenises. Shards end after a fixed
number of text bytes, so an interrupted build leaves whole shards behind that the next one keeps.
"""

import hashlib
import math
from array import array
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gemma_jax import buckets, files
from gemma_jax.data import shard_writer
from gemma_jax.data.corpora import Part, find_parts, read_parts
from gemma_jax.data.token_set import (
    FORMAT,
    MANIFEST_FILE,
    SPLITS,
    VERSION,
    Documents,
    TokenSet,
    token_dtype,
)
from gemma_jax.data.tokenizer import MODEL_FILE, Tokenizer, TokenizerConfig
from gemma_jax.data.tokenizer_training import train_tokenizer
from gemma_jax.errors import UserError
from gemma_jax.progress import progress
from gemma_jax.settings import check_types

__all__ = ["Corpus", "Documents", "TokenSet", "build_tokens"]

_STATE_FILE = "build.json"


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """What a token set is made of, and where it lies.

    Args:
      path: the folder of the token set.
      sources: see `gemma_jax.data.corpora` for what a source may be.
      tokenizer: how to train one on this corpus, or the path of one (a model file, or the folder
        of another token set).
      valid_fraction: share of documents held out, chosen by their hash. At least this share, by
        count, of a corpus of two documents or more.
      text_field: the field of JSON lines, or column of a table, that holds the text.
      drop_duplicates: keep only the first of documents that are equal to the byte.
      shard_bytes: UTF-8 bytes of text after which a shard ends.
    """

    path: str
    sources: tuple[str, ...]
    tokenizer: TokenizerConfig | str = field(default_factory=TokenizerConfig)
    valid_fraction: float = 0.01
    text_field: str = "text"
    drop_duplicates: bool = True
    shard_bytes: int = 64 << 20

    def __post_init__(self) -> None:
        if isinstance(self.sources, str):
            raise UserError(f'sources is one text; write ("{self.sources}",), with the comma.')
        check_types(self)
        if not 0 <= self.valid_fraction < 1:
            raise UserError(
                f"valid_fraction {self.valid_fraction} is not in [0, 1); 0.01 holds out 1 %."
            )
        if self.shard_bytes < 1:
            raise UserError(f"shard_bytes {self.shard_bytes} is not positive; leave the default.")


def build_tokens(corpus: Corpus, workers: int | None = None) -> TokenSet:
    """Tokenises a corpus, or opens it where that is done already.

    Args:
      corpus: the description.
      workers: threads of the tokenizer; all cores by default. The result does not depend on it.

    Raises:
      UserError: for bad input, and where the folder was built from something else.
    """
    folder = buckets.place(corpus.path)
    if (folder / MANIFEST_FILE).exists():
        return _reopen(corpus, folder)
    parts = find_parts(corpus.sources)
    with files.locked(folder):
        if (folder / MANIFEST_FILE).exists():  # another process was faster
            return _reopen(corpus, folder)
        state = _prepare(corpus, folder, parts)
        tokenizer = Tokenizer.load(folder / MODEL_FILE)
        with progress("tokenise", state["bytes"]) as advance:
            shards = shard_writer.write_shards(
                folder,
                _split_documents(parts, corpus, state["valid_below"]),
                tokenizer,
                shard_bytes=corpus.shard_bytes,
                workers=workers,
                advance=advance,
            )
        _finish(folder, state, tokenizer, shards)
        return TokenSet.open(folder)


def _prepare(corpus: Corpus, folder: Path, parts: list[Part]) -> dict[str, Any]:
    """The first pass, or its result where an earlier build got that far."""
    description = _describe(corpus)
    if (folder / _STATE_FILE).exists():
        state = files.read_json(folder / _STATE_FILE, "the state of an unfinished token set")
        _check_same(folder, state["description"], description)
        _check_parts(folder, parts, state["sources"])
        return state
    survey = {"documents": 0, "bytes": 0, "duplicates": 0}
    hashes = array("Q")
    texts = _surveyed(parts, corpus, survey, hashes)
    if isinstance(corpus.tokenizer, TokenizerConfig):
        train_tokenizer(texts, corpus.tokenizer, folder / MODEL_FILE)
    else:
        tokenizer = Tokenizer.load(corpus.tokenizer)
        for _ in texts:
            pass
        tokenizer.save(folder / MODEL_FILE)
    state = {
        "description": description,
        "sources": [part.identity() for part in parts],
        **survey,
        "valid_below": held_out_below(np.unique(np.array(hashes)), corpus.valid_fraction),
    }
    files.write_json(folder / _STATE_FILE, state)
    return state


def held_out_below(hashes: np.ndarray, fraction: float) -> int:
    """Documents with a hash below it are held out.

    It is `fraction` of all hashes, so that a document falls to the same side in every corpus; or
    more where chance would hold out too few of a small corpus. One document is always trained on.
    """
    count = min(math.ceil(fraction * len(hashes)), len(hashes) - 1)
    if count < 1:
        return 0
    return min(max(int(fraction * 2.0**64), int(hashes[count - 1]) + 1), int(hashes[-1]))


def _surveyed(
    parts: list[Part], corpus: Corpus, survey: dict[str, int], hashes: array[int]
) -> Iterator[str]:
    """Passes documents on while it counts them and notes their hashes."""
    for text, size, key in _unique(parts, corpus, survey, show_progress=True):
        survey["documents"] += 1
        survey["bytes"] += size
        hashes.append(key)
        yield text
    if not survey["documents"]:
        raise UserError(
            f"the corpus {', '.join(corpus.sources)} has no text: every document is empty; give "
            "other sources."
        )


def _split_documents(
    parts: list[Part], corpus: Corpus, valid_below: int
) -> Iterator[tuple[str, int, str]]:
    """(text, UTF-8 bytes, split) of each document."""
    for text, size, key in _unique(parts, corpus):
        yield text, size, "valid" if key < valid_below else "train"


def _unique(
    parts: list[Part],
    corpus: Corpus,
    survey: dict[str, int] | None = None,
    *,
    show_progress: bool = False,
) -> Iterator[tuple[str, int, int]]:
    """(text, UTF-8 bytes, 64-bit hash) of each document that is not the copy of an earlier one."""
    seen: set[int] = set()
    for text, _ in read_parts(parts, corpus.text_field, show_progress=show_progress):
        data = text.encode()
        key = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
        if corpus.drop_duplicates:
            if key in seen:
                if survey is not None:
                    survey["duplicates"] += 1
                continue
            seen.add(key)
        yield text, len(data), key


def _describe(corpus: Corpus) -> dict[str, Any]:
    """The description as the manifest keeps it: without the place, the tokenizer by its hash."""
    description = asdict(corpus)
    del description["path"]
    description["sources"] = list(corpus.sources)
    if isinstance(corpus.tokenizer, str):
        description["tokenizer"] = {"sha256": Tokenizer.load(corpus.tokenizer).hash}
    return description


def _check_same(folder: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    for key in here:
        if there.get(key) != here[key]:
            raise UserError(
                f"{folder} was built with another {key} ({_difference(there.get(key), here[key])});"
                " choose another path, or delete that folder and build it again."
            )


def _difference(there: Any, here: Any) -> str:
    if isinstance(there, dict) and isinstance(here, dict):
        keys = [k for k in {**there, **here} if there.get(k) != here.get(k)]
        return "; ".join(f"{k}: there {there.get(k)}, here {here.get(k)}" for k in keys)
    if isinstance(there, list) and isinstance(here, list):
        pairs = [(a, b) for a, b in zip(there, here, strict=False) if a != b]
        if pairs:
            return _difference(*pairs[0])
        return f"there {len(there)} of them, here {len(here)}"
    return f"there {there}, here {here}"


def _reopen(corpus: Corpus, folder: Path) -> TokenSet:
    """A finished set, if it is of this description and its sources are as they were.

    Sources that have gone since are fine: the token set is all that is needed.
    """
    token_set = TokenSet.open(folder)
    _check_same(folder, token_set.manifest["description"], _describe(corpus))
    try:
        parts = find_parts(corpus.sources)
    except UserError:
        return token_set
    _check_parts(folder, parts, token_set.manifest["sources"])
    return token_set


def _check_parts(folder: Path, parts: list[Part], there: list[dict[str, Any]]) -> None:
    names = [entry["name"] for entry in there]
    if added := [part.name for part in parts if part.name not in names]:
        changed = f"without {added[0]}, which its sources now name"
    elif [part.name for part in parts] != names:
        changed = f"from {len(names)} files of which {len(parts)} are left"
    elif differ := [p.name for p, entry in zip(parts, there, strict=True) if not p.is_still(entry)]:
        changed = f"from another text of {differ[0]}, which has changed since"
    else:
        return
    raise UserError(
        f"{folder} was built {changed}; choose another path, or delete that folder and build it "
        "again."
    )


def _finish(
    folder: Path, state: dict[str, Any], tokenizer: Tokenizer, shards: list[dict[str, Any]]
) -> None:
    splits = {}
    for split in SPLITS:
        own = [shard[split] for shard in shards if shard[split]["documents"]]
        total = {key: sum(s[key] for s in own) for key in ("documents", "tokens", "bytes")}
        splits[split] = {**total, "shards": own}
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "token_dtype": token_dtype(tokenizer.vocab_size).str,
        "tokenizer": {
            "file": MODEL_FILE,
            "sha256": tokenizer.hash,
            "vocab_size": tokenizer.vocab_size,
        },
        "description": state["description"],
        "sources": state["sources"],
        "duplicates_dropped": state["duplicates"],
        "splits": splits,
    }
    files.write_json(folder / MANIFEST_FILE, manifest)
    shard_writer.remove_notes(folder)
    (folder / _STATE_FILE).unlink(missing_ok=True)
