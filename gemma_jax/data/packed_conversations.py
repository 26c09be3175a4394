"""Conversations packed whole into sequences, any of them by its number.

Epoch after epoch the conversations are shuffled anew and each is laid where it fits best among the
sequences begun so far. None is cut in two, so each sees all of its own context; positions start at
0 in each and segments keep them apart. An epoch ends with its last sequence: every conversation
comes exactly once in each.
"""

import bisect
import functools
import threading
from collections.abc import Iterator, Sequence

import numpy as np

from gemma_jax.data.conversations import Conversation
from gemma_jax.data.packing import FIELDS, Batch, check_seq_len, shuffled

_OPEN = 1024  # sequences that are still looked at: bounds the time of an epoch's packing


class PackedConversations:
    """The endless stream of packed sequences over `conversations`."""

    def __init__(self, conversations: Sequence[Conversation], seq_len: int, seed: int) -> None:
        check_seq_len(seq_len)
        self.seq_len = seq_len
        self._ids = [one.ids for one in conversations]
        self._spoken = [one.spoken for one in conversations]
        self._lengths = np.array([len(ids) - 1 for ids in self._ids])
        self._seed = seed
        self._starts = [0]  # the first sequence of each epoch that was asked for
        self._lock = threading.Lock()
        self._rows = functools.lru_cache(maxsize=2)(self._lay_out)

    def count(self, epochs: int) -> int:
        """Sequences in the first `epochs` epochs."""
        with self._lock:
            while len(self._starts) <= epochs:
                self._starts.append(self._starts[-1] + len(self._rows(len(self._starts) - 1)))
            return self._starts[epochs]

    def most_documents(self, sequences: int) -> int:
        """That are in one of the first `sequences`, padding counted."""
        most, epoch = 1, 0
        while self.count(epoch) < sequences:
            for row in self._rows(epoch):
                filled = int(self._lengths[row].sum()) == self.seq_len
                most = max(most, len(row) + (not filled))
            epoch += 1
        return most

    def read(self, numbers: Sequence[int], limit: int | None = None) -> Batch:
        """The sequences `numbers` as arrays [n, T]; those from `limit` on are padding."""
        T = self.seq_len
        batch = {name: np.zeros((len(numbers), T), kind) for name, kind in FIELDS.items()}
        for row, number in enumerate(numbers):
            if limit is not None and number >= limit:
                continue
            column = 0
            for segment, i in enumerate(self._members(number), 1):
                ids, spoken, length = self._ids[i], self._spoken[i], int(self._lengths[i])
                place = (row, slice(column, column + length))
                batch["tokens"][place] = ids[:-1]
                batch["labels"][place] = ids[1:]
                batch["segment_ids"][place] = segment
                batch["positions"][place] = np.arange(length)
                batch["loss_mask"][place] = spoken[1:]
                column += length
        return batch

    def once(self) -> Iterator[Batch]:
        """The sequences of the first epoch, each as arrays [T]."""
        for number in range(self.count(1)):
            yield {name: rows[0] for name, rows in self.read([number]).items()}

    def _members(self, number: int) -> list[int]:
        """The conversations of a sequence."""
        epoch = 0
        while self.count(epoch + 1) <= number:
            epoch += 1
        return self._rows(epoch)[number - self._starts[epoch]]

    def _lay_out(self, epoch: int) -> list[list[int]]:
        order = shuffled(len(self._ids), self._seed, epoch, 0)
        rows: list[list[int]] = []
        open_rows: list[tuple[int, int]] = []  # (room, row), by room
        shortest = int(self._lengths.min())
        for i in order.tolist():
            length = int(self._lengths[i])
            best = bisect.bisect_left(open_rows, (length, 0))
            if best < len(open_rows):
                room, row = open_rows.pop(best)
            else:
                room, row = self.seq_len, len(rows)
                rows.append([])
            rows[row].append(i)
            if room - length >= shortest:
                bisect.insort(open_rows, (room - length, row))
                if len(open_rows) > _OPEN:  # the fullest
                    open_rows.pop(0)
        return [rows[row] for row in shuffled(len(rows), self._seed, epoch, 1).tolist()]
