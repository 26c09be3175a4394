"""Packing: documents laid end to end and cut every T, by number rather than by turn.

The lengths of all documents are known, so the sequence with number n can be made without those
before it: a stream has no state but the number, and its data depend neither on the batch size nor
on the number of hosts. A document `d = [bos] + text + [eos]` gives the inputs `d[:-1]` and the
labels `d[1:]`; every such pair comes exactly once a pass. Where a sequence ends inside a document,
the rest is a segment of its own in the next sequence, with positions from 0.
"""

import itertools
from collections.abc import Collection, Iterator, Sequence
from functools import lru_cache

import numpy as np

from gemma_jax.data.token_set import Documents, TokenSet
from gemma_jax.errors import UserError

Batch = dict[str, np.ndarray]

FIELDS = {
    "tokens": np.int32,
    "labels": np.int32,
    "segment_ids": np.int32,
    "positions": np.int32,
    "loss_mask": np.float32,
}


def shuffled(count: int, *words: int) -> np.ndarray:
    """int64 [count]: the numbers below `count` in an order that `words` alone decide.

    Sorts by a hash (SplitMix64) in place of asking NumPy's generators, whose streams may change
    between versions.
    """
    key = np.uint64(0)
    for word in words:
        key = _mix(key ^ np.array([word & (1 << 64) - 1], np.uint64))[0]
    return np.argsort(_mix(np.arange(count, dtype=np.uint64) ^ key), kind="stable")


def _mix(x: np.ndarray) -> np.ndarray:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class PackedStream:
    """The endless stream of packed sequences of one split, any of them at any time.

    Epoch after epoch the documents are shuffled anew and laid end to end. Sequence q takes the
    pairs qT to (q + 1)T of that line, so nothing is dropped between epochs. Within an epoch the
    sequences are shuffled too: otherwise the parts of a long document would fill a whole batch.
    """

    def __init__(self, documents: Documents, seq_len: int, seed: int, *, shuffle_sequences: bool):
        check_seq_len(seq_len)
        self.documents, self.seq_len = documents, seq_len
        self.pairs = int(documents.lengths.sum()) - len(documents)  # an epoch
        self._seed, self._shuffle_sequences = seed, shuffle_sequences
        self._epoch = lru_cache(maxsize=3)(self._lay_out)
        self._sequence_order = lru_cache(maxsize=3)(self._order_sequences)

    def read(self, numbers: Sequence[int], limit: int | None = None) -> Batch:
        """The sequences `numbers` as arrays [n, T]; pairs from `limit` on are left as padding."""
        T = self.seq_len
        batch = {name: np.zeros((len(numbers), T), kind) for name, kind in FIELDS.items()}
        spans = []  # (row, column, segment, offset in the document, length)
        wanted: list[np.ndarray] = []
        for row, number in enumerate(numbers):
            first = self._place(number) * T
            last = first + T if limit is None else min(first + T, limit)
            column = segment = 0
            for documents, offsets, lengths in self._cover(first, last):
                wanted.append(documents)
                for offset, length in zip(offsets.tolist(), lengths.tolist(), strict=True):
                    segment += 1
                    spans.append((row, column, segment, offset, length))
                    column += length
        found = self.documents.read(np.concatenate(wanted)) if wanted else []
        counting = np.arange(T, dtype=np.int32)
        for (row, column, segment, offset, length), ids in zip(spans, found, strict=True):
            place = (row, slice(column, column + length))
            batch["tokens"][place] = ids[offset : offset + length]
            batch["labels"][place] = ids[offset + 1 : offset + 1 + length]
            batch["segment_ids"][place] = segment
            batch["positions"][place] = counting[:length]
            batch["loss_mask"][place] = 1
        return batch

    def most_documents(self, sequences: int) -> int:
        """That are in one sequence, in all epochs that the first `sequences` of them reach."""
        return self.most_in_epochs(-(-sequences * self.seq_len // self.pairs))

    def most_in_epochs(self, epochs: int) -> int:
        """The same; where the last epoch ends inside a sequence, the rest of that counts as one."""
        most = last = last_count = 0
        for epoch in range(epochs):
            ends = self._epoch(epoch)[1] + epoch * self.pairs
            inside = ends[ends % self.seq_len > 0]
            within, counts = np.unique(inside // self.seq_len, return_counts=True)
            if len(within) == 0:
                continue
            if within[0] == last:
                counts[0] += last_count
            most = max(most, int(counts.max()))
            last, last_count = int(within[-1]), int(counts[-1])
        return most + 1

    def _place(self, number: int) -> int:
        """Where in the line the sequence `number` lies."""
        if not self._shuffle_sequences:
            return number
        epoch = number * self.seq_len // self.pairs
        start, order = self._sequence_order(epoch)
        return start + int(order[number - start])

    def _order_sequences(self, epoch: int) -> tuple[int, np.ndarray]:
        start, end = (-(-e * self.pairs // self.seq_len) for e in (epoch, epoch + 1))
        return start, shuffled(end - start, self._seed, epoch, 1)

    def _lay_out(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The order of the documents in an epoch, and where each ends in it, counted in pairs."""
        order = shuffled(len(self.documents), self._seed, epoch, 0)
        return order, np.cumsum(self.documents.lengths[order] - 1)

    def _cover(self, first: int, last: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Documents, offsets into them and lengths that make up the pairs [first, last)."""
        while first < last:
            epoch, start = divmod(first, self.pairs)
            stop = min(start + last - first, self.pairs)
            order, ends = self._epoch(epoch)
            i = np.searchsorted(ends, start, side="right")
            j = np.searchsorted(ends, stop, side="left") + 1
            begins = ends[i:j] - (self.documents.lengths[order[i:j]] - 1)
            offsets = np.maximum(start - begins, 0)
            yield order[i:j], offsets, np.minimum(ends[i:j], stop) - begins - offsets
            first += stop - start


class PackedPass(Sequence[Batch]):
    """One pass over a split in a fixed order: sequences by number, each a dict of [T] arrays."""

    def __init__(self, stream: PackedStream):
        self.seq_len = stream.seq_len
        self.pairs = stream.pairs
        self._stream = stream

    def __len__(self) -> int:
        return -(-self.pairs // self.seq_len)

    def __getitem__(self, index: int) -> Batch:  # type: ignore[override]
        number = index.__index__()
        if not -len(self) <= number < len(self):
            raise IndexError(f"sequence {number} of {len(self)}")
        return {name: rows[0] for name, rows in self.read([number % len(self)]).items()}

    def most_documents(self) -> int:
        """That are in one sequence, padding counted."""
        return self._stream.most_in_epochs(1)

    def read(self, numbers: Sequence[int]) -> Batch:
        """Several sequences at once, as arrays [n, T]; numbers past the end give pure padding."""
        return self._stream.read(numbers, limit=self.pairs)


def packed_sequences(token_set: TokenSet, split: str, seq_len: int, seed: int = 0) -> PackedPass:
    """One pass over `split`: documents shuffled by `seed`, packed, the last sequence padded.

    Returns:
      a sequence with random access; each item a dict of [T] arrays (`tokens`, `labels`,
      `segment_ids`, `positions` int32, `loss_mask` float32).

    Raises:
      UserError: if the split is empty or `seq_len` is below 2.
    """
    documents = token_set.documents(split)
    return PackedPass(PackedStream(documents, seq_len, seed, shuffle_sequences=False))


def valid_sequences(
    token_sets: Collection[TokenSet], seq_len: int, max_tokens: int
) -> Iterator[Batch]:
    """Held-out sequences, the same ones each time: an equal share of `max_tokens` from each set."""
    limit = max(1, max_tokens // len(token_sets) // seq_len)
    for token_set in token_sets:
        yield from itertools.islice(packed_sequences(token_set, "valid", seq_len), limit)


def check_seq_len(seq_len: int) -> None:
    if seq_len < 2:
        raise UserError(f"seq_len {seq_len} is too short to pack; set it to 2 or more.")
