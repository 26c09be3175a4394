"""One record of a teacher shard: a packed sequence and its sparse targets, as bytes.

A record carries its own tokens and segments, so that the student sees exactly the context that
the teacher saw, whatever the batch size, order or number of hosts. All integers are little-endian.

    header   32 bytes, see `_HEADER`; its last field is the CRC-32 of all other bytes
    runs     4 x uint32 each: length, segment id, first position, last label
    tokens   uint32 a position: token | number of targets << 18
    targets  uint32 each: id | count << 18, in order of position, then of id
    logprob  float16 a kept position: the teacher's log-probability of the label, nats
    entropy  float16 a kept position: the entropy of the teacher's distribution, nats

A run is a stretch in which the segment is the same, positions rise by one and each label but the
last is the next token. A kept position (loss_mask 1) has at least one target, any other has none.
Half precision rounds a log-probability by at most 0.05 %: these two serve averages alone, and the
targets themselves are integers.
"""

import struct
import zlib
from dataclasses import dataclass

import numpy as np

ID_BITS = 18
MAX_DRAWS = (1 << (32 - ID_BITS)) - 1
MAX_VOCAB = 1 << ID_BITS
_ID_MASK = MAX_VOCAB - 1

MAGIC = b"GJTR"
RECORD_VERSION = 1
# magic, version, draws, record index, positions, kept positions, runs, targets, crc32
_HEADER = struct.Struct("<4sHHIIIIII")
LOWEST_LOGPROB = np.float32(-65504.0)  # the lowest half; -inf is stored as this


class RecordError(ValueError):
    """The bytes are no intact record; the message says what is wrong, the reader adds where."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """A decoded record; T positions, K of them kept, E targets.

    `tokens, labels, segment_ids, positions` int32 [T]; `num_targets` int32 [T], 0 where the
    position does not count; `ids`, `counts` int32 [E]; `label_logprob`, `entropy` float16 [K].
    """

    record_index: int
    draws: int
    tokens: np.ndarray
    labels: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray
    num_targets: np.ndarray
    ids: np.ndarray
    counts: np.ndarray
    label_logprob: np.ndarray
    entropy: np.ndarray

    def padded(self, max_targets: int) -> dict[str, np.ndarray]:
        """The arrays of a training example, targets padded to M = `max_targets` a position."""
        T = len(self.tokens)
        kept = self.num_targets > 0
        slots = np.arange(max_targets, dtype=np.int32) < self.num_targets[:, None]
        target_ids = np.zeros((T, max_targets), np.int32)
        target_ids[slots] = self.ids
        target_weights = np.zeros((T, max_targets), np.float32)
        target_weights[slots] = self.counts.astype(np.float32) / np.float32(self.draws)
        label_logprob = np.zeros(T, np.float32)
        label_logprob[kept] = self.label_logprob
        entropy = np.zeros(T, np.float32)
        entropy[kept] = self.entropy
        return {
            "tokens": self.tokens,
            "labels": self.labels,
            "segment_ids": self.segment_ids,
            "positions": self.positions,
            "loss_mask": kept.astype(np.float32),
            "target_ids": target_ids,
            "target_weights": target_weights,
            "teacher_label_logprob": label_logprob,
            "teacher_entropy": entropy,
        }


def encode_record(
    sequence: dict[str, np.ndarray],
    words: np.ndarray,
    label_logprob: np.ndarray,
    entropy: np.ndarray,
    *,
    record_index: int,
    draws: int,
) -> bytes:
    """Bytes of one record.

    `sequence` holds the [T] arrays of a packed sequence with a loss_mask of zeros and ones;
    `words` uint32 [T, N] is id | count << 18, ids ascending, count 0 = unused; `label_logprob`,
    `entropy` float [T].
    """
    kept = sequence["loss_mask"] > 0
    used = (words >> ID_BITS > 0) & kept[:, None]
    num_targets = used.sum(axis=1).astype(np.uint32)
    targets = words[used]
    runs = _runs(sequence)
    body = b"".join(
        (
            runs.astype("<u4").tobytes(),
            (sequence["tokens"].astype(np.uint32) | num_targets << ID_BITS).astype("<u4").tobytes(),
            targets.astype("<u4").tobytes(),
            np.maximum(label_logprob[kept], LOWEST_LOGPROB).astype("<f2").tobytes(),
            entropy[kept].astype("<f2").tobytes(),
        )
    )
    counts = (len(kept), int(kept.sum()), len(runs), len(targets))
    head = _HEADER.pack(MAGIC, RECORD_VERSION, draws, record_index, *counts, 0)[:-4]
    return head + struct.pack("<I", zlib.crc32(body, zlib.crc32(head))) + body


def _runs(sequence: dict[str, np.ndarray]) -> np.ndarray:
    """[runs, 4]: length, segment id, first position, last label."""
    tokens, labels = sequence["tokens"], sequence["labels"]
    segment_ids, positions = sequence["segment_ids"], sequence["positions"]
    goes_on = (
        (segment_ids[1:] == segment_ids[:-1])
        & (positions[1:] == positions[:-1] + 1)
        & (labels[:-1] == tokens[1:])
    )
    ends = np.append(np.flatnonzero(~goes_on), len(tokens) - 1)
    starts = np.append(0, ends[:-1] + 1)
    return np.stack([ends - starts + 1, segment_ids[starts], positions[starts], labels[ends]], 1)


def decode_record(content: bytes) -> Record:
    """The record in `content`; raises RecordError where a byte is wrong."""
    if len(content) < _HEADER.size:
        raise RecordError("it is shorter than a header")
    magic, version, draws, index, T, K, R, E, crc = _HEADER.unpack_from(content)
    if magic != MAGIC:
        raise RecordError("it does not begin with the mark of a teacher record")
    if version != RECORD_VERSION:
        raise RecordError(f"it has format version {version}, and {RECORD_VERSION} is known")
    if len(content) != _HEADER.size + 16 * R + 4 * T + 4 * E + 4 * K:
        raise RecordError("its length does not fit its header")
    body = memoryview(content)[_HEADER.size :]
    if zlib.crc32(body, zlib.crc32(content[: _HEADER.size - 4])) != crc:
        raise RecordError("its checksum does not fit")

    words = np.frombuffer(body, "<u4", 4 * R + T + E).astype(np.uint32, copy=False)
    runs = words[: 4 * R].reshape(R, 4).astype(np.int32)
    token_words, target_words = words[4 * R : 4 * R + T], words[4 * R + T :]
    halves = np.frombuffer(body, "<f2", 2 * K, offset=4 * len(words))
    lengths, segments, first_positions, last_labels = runs.T
    ends = np.cumsum(lengths, dtype=np.int32)
    if T and (R == 0 or ends[-1] != T):
        raise RecordError("its runs do not add up to its positions")
    tokens = (token_words & _ID_MASK).astype(np.int32)
    labels = np.empty_like(tokens)
    labels[:-1] = tokens[1:]
    labels[ends - 1] = last_labels
    offsets = ends - lengths - first_positions
    return Record(
        record_index=index,
        draws=draws,
        tokens=tokens,
        labels=labels,
        segment_ids=np.repeat(segments, lengths),
        positions=np.arange(T, dtype=np.int32) - np.repeat(offsets, lengths),
        num_targets=(token_words >> ID_BITS).astype(np.int32),
        ids=(target_words & _ID_MASK).astype(np.int32),
        counts=(target_words >> ID_BITS).astype(np.int32),
        label_logprob=halves[:K],
        entropy=halves[K:],
    )


def check_targets(record: Record, *, vocab_size: int, draws: int) -> None:
    """Raises RecordError unless the targets are what the format promises."""
    if record.draws != draws:
        raise RecordError(f"it holds {record.draws} draws a token where the manifest says {draws}")
    if record.num_targets.sum() != len(record.ids):
        raise RecordError("the numbers of its targets do not add up")
    if np.count_nonzero(record.num_targets) != len(record.label_logprob):
        raise RecordError("its kept positions do not fit its header")
    if len(record.ids) == 0:
        return
    if max(record.ids.max(), record.tokens.max(), record.labels.max()) >= vocab_size:
        raise RecordError(f"it holds an id that is not below the vocabulary size {vocab_size}")
    starts = np.cumsum(record.num_targets) - record.num_targets
    starts = starts[record.num_targets > 0]
    if record.counts.min() < 1 or np.any(np.add.reduceat(record.counts, starts) != draws):
        raise RecordError(f"the counts of a position do not add up to {draws}")
    rises = np.diff(record.ids) > 0
    rises[starts[1:] - 1] = True
    if not rises.all():
        raise RecordError("the ids of a position do not ascend")
    if not (np.isfinite(record.label_logprob).all() and np.isfinite(record.entropy).all()):
        raise RecordError("a log-probability or entropy is not finite")
