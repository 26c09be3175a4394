"""What is fed in where nobody gives data: drawn, but written to disk and read as real data are."""

from pathlib import Path

import numpy as np

from gemma_jax.data.packing import packed_sequences
from gemma_jax.data.record_file import RecordWriter
from gemma_jax.data.token_set import TokenSet, token_dtype
from gemma_jax.distill.records import ID_BITS, encode_record
from gemma_jax.distill.shard_writer import ShardsWriter
from gemma_jax.distill.shards import ShardsDescription, TeacherShards

DRAWS = 64  # N of random targets
_UNIQUE = 20  # distinct ids a token, on average
_SHARD_RECORDS = 64


def zipf_tokens(count: int, vocab_size: int, seed: int = 0) -> np.ndarray:
    """int64 [count]: the id of rank r is drawn with probability ~ 1 / r, as words are in texts.

    Which id has which rank is drawn too; 0, the padding, is never among them.
    """
    rng = np.random.default_rng(seed)
    ids = 1 + rng.permutation(vocab_size - 1)
    below = np.cumsum(1 / np.arange(1, vocab_size))
    return ids[np.searchsorted(below, rng.random(count) * below[-1], side="right")]


def draw_token_set(
    folder: Path, *, vocab_size: int, seq_len: int, documents: int, sequences: int, seed: int
) -> TokenSet:
    """A token set without a tokenizer, of at least about `sequences` packed sequences, which hold
    `documents` each on average.

    One document a sequence is exactly that. More are of random lengths, so that sequences cut
    some, as they do in real data: their pairs are geometric with mean seq_len / (documents - 1).
    """
    pairs = seq_len * sequences
    rng = np.random.default_rng(seed)
    if documents == 1:
        lengths = np.full(pairs // seq_len, seq_len + 1)
    else:
        chance = min(1.0, (documents - 1) / seq_len)
        lengths = 1 + rng.geometric(chance, size=2 + int(1.5 * pairs * chance))
    ids = zipf_tokens(int(lengths.sum()), vocab_size, seed).astype(token_dtype(vocab_size))
    folder.mkdir(parents=True, exist_ok=True)
    shard = folder / "train-00000.arrayrecord"
    writer = RecordWriter(shard, "group_size:1,uncompressed")
    for document in np.split(ids, np.cumsum(lengths)[:-1]):
        writer.write(document.tobytes())
    writer.finish()
    shard.with_suffix(".lengths").write_bytes(lengths.astype("<u4").tobytes())
    entry = {
        "file": shard.name,
        "lengths_file": shard.with_suffix(".lengths").name,
        "documents": len(lengths),
        "size": shard.stat().st_size,
    }
    splits = {"train": {"shards": [entry]}, "valid": {"shards": []}}
    return TokenSet(folder, {"token_dtype": ids.dtype.str, "splits": splits})


def draw_shards(
    folder: Path, tokens: TokenSet, *, vocab_size: int, seq_len: int, seed: int
) -> TeacherShards:
    """Teacher shards of `tokens` with random targets: 64 draws, about 20 distinct ids a token, 64
    at most (in a vocabulary that has them), so M is what a real teacher's shards have."""
    sequences = packed_sequences(tokens, "train", seq_len, seed)
    count = min(len(sequences), _SHARD_RECORDS)
    description = ShardsDescription(
        teacher_hash="drawn",
        tokenizer_hash="drawn",
        vocab_size=vocab_size,
        seq_len=seq_len,
        draws=DRAWS,
        method="systematic",
        seed=seed,
        num_records=count,
        records_per_shard=count,
    )
    rng = np.random.default_rng(seed)

    def record(index: int) -> bytes:
        words = _random_targets(rng, seq_len, vocab_size)
        statistics = np.full(seq_len, -3.0), np.full(seq_len, 2.5)
        return encode_record(sequences[index], words, *statistics, record_index=index, draws=DRAWS)

    writer = ShardsWriter(folder, description)
    writer.write(0, map(record, range(count)))
    writer.finish()
    return TeacherShards.open(folder)


def _random_targets(rng: np.random.Generator, seq_len: int, vocab_size: int) -> np.ndarray:
    """uint32 [T, N]: id | count << 18, ids ascending, counts of a row adding up to N."""
    most = min(DRAWS, vocab_size)
    unique = np.minimum(rng.geometric(1 / _UNIQUE, seq_len), most)
    unique[0] = most
    slots = np.arange(DRAWS)
    used = slots < unique[:, None]
    # One id from each of as many equal stretches of the vocabulary: distinct and ascending.
    stretch = vocab_size / unique[:, None]
    ids = np.floor(slots * stretch) + np.floor(rng.random((seq_len, DRAWS)) * np.floor(stretch))
    counts = used.astype(np.uint32)
    counts[:, 0] += (DRAWS - unique).astype(np.uint32)
    return np.where(used, ids.astype(np.uint32) | counts << ID_BITS, 0).astype(np.uint32)
