"""The stream of training batches: sources mixed by weights that may change from stage to stage.

Everything is a function of the seed and the number of the batch, so Grain's whole state is that
number: it resumes exactly, on any number of hosts.
"""

import hashlib
from collections.abc import Mapping, Sequence

import grain
import numpy as np

from gemma_jax.data.mixture import Stage
from gemma_jax.data.packed_conversations import PackedConversations
from gemma_jax.data.packing import Batch, PackedStream, check_seq_len
from gemma_jax.data.token_set import TokenSet
from gemma_jax.errors import UserError

_WEIGHT_BITS = 48


class Turns:
    """Tells for each sequence number of a run its source and its number within that source.

    Sources alternate as evenly as can be (Bresenham's line, one source split off after another):
    after any number of sequences of a stage, a count of S sources is off its share by S/2 at most.
    """

    def __init__(self, stages: Sequence[Stage], names: Sequence[str], sequences: int):
        self._names = list(names)
        self._starts: list[int] = []
        self._shares: list[list[int]] = []  # of what is left, in units of 2^-_WEIGHT_BITS
        self._before: list[list[int]] = []  # sequences of each source in the stages before
        start, counts = 0, [0] * len(self._names)
        for stage in stages:
            self._starts.append(start)
            self._before.append(counts)
            self._shares.append(self._split(stage))
            end = round(stage.until * sequences)
            within = self._counts(end - start, self._shares[-1])
            counts = [a + b for a, b in zip(counts, within, strict=True)]
            start = end
        self.totals = dict(zip(self._names, counts, strict=True))  # sequences by source

    def locate(self, number: int) -> tuple[str, int]:
        """(source, number within the source) of the run's sequence `number`."""
        stage = int(np.searchsorted(self._starts, number, side="right")) - 1
        n = number - self._starts[stage]
        now = self._counts(n, self._shares[stage])
        then = self._counts(n + 1, self._shares[stage])
        source = next(i for i, (a, b) in enumerate(zip(now, then, strict=True)) if b > a)
        return self._names[source], self._before[stage][source] + now[source]

    def _split(self, stage: Stage) -> list[int]:
        left = float(sum(stage.weights.values()))
        shares = []
        for name in self._names:
            weight = stage.weights.get(name, 0.0)
            last = weight > 0 and left - weight < 1e-12 * left
            shares.append(1 << _WEIGHT_BITS if last else int(weight / left * 2.0**_WEIGHT_BITS))
            left = max(left - weight, 1e-300)
        return shares

    def _counts(self, n: int, shares: list[int]) -> list[int]:
        """How many of the first n sequences of a stage each source gives; exact in integers."""
        counts = []
        half = 1 << _WEIGHT_BITS - 1
        for share in shares:
            own = n * share + half >> _WEIGHT_BITS
            counts.append(own)
            n -= own
        return counts


class TextBatches:
    """Batches by number, this host's rows of them: what Grain reads from."""

    def __init__(
        self, streams: dict[str, PackedStream], turns: Turns, rows: list[int], size: int, count: int
    ):
        self._streams, self._turns = streams, turns
        self._rows, self._size, self._count = rows, size, count

    def stream(self) -> grain.IterDataset:
        """Made ahead by two threads; the state of its iterators is the number of the next batch."""
        return grain.MapDataset.source(self).to_iter_dataset(
            grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
        )

    def most_documents(self) -> int:
        """That are in any sequence of the run."""
        totals = self._turns.totals.items()
        return max(self._streams[name].most_documents(count) for name, count in totals if count)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> Batch:
        wanted: dict[str, tuple[list[int], list[int]]] = {}
        for place, row in enumerate(self._rows):
            name, within = self._turns.locate(int(number) * self._size + row)
            places, numbers = wanted.setdefault(name, ([], []))
            places.append(place)
            numbers.append(within)
        read = {name: self._streams[name].read(numbers) for name, (_, numbers) in wanted.items()}
        if len(read) == 1:
            return next(iter(read.values()))
        order = np.argsort(np.concatenate([wanted[name][0] for name in read]))
        fields = next(iter(read.values()))
        return {f: np.concatenate([part[f] for part in read.values()])[order] for f in fields}


def train_batches(
    sources: Mapping[str, TokenSet],
    stages: Sequence[Stage],
    *,
    seq_len: int,
    batch_size: int,
    num_batches: int,
    seed: int,
    rows: Sequence[int] | None = None,
) -> TextBatches:
    """The training batches, `num_batches` of them, or this host's rows of each.

    Sequence r of batch i is the sequence iB + r of the run; the mixture says which source it comes
    from. Each source goes through its epochs at its own pace and goes on where it was when the
    stage changes.

    Args:
      sources: token sets by name, all of one tokenizer; their `train` splits are read.
      stages: the weights of the sources over the run.
      seq_len: T.
      batch_size: B, sequences of the global batch.
      num_batches: length of the run, to which `Stage.until` refers.
      seed: decides the order.
      rows: which rows of each batch are read; all by default.

    Returns:
      dicts of [B, T] or [len(rows), T] arrays by number, and `stream()`, an IterDataset of them.

    Raises:
      UserError: for stages, sizes or sources that do not fit together.
    """
    check_seq_len(seq_len)
    _check_stages(sources, stages)
    own = checked_rows(batch_size, rows)
    if num_batches < 1:
        raise UserError(f"num_batches {num_batches} must be 1 or more.")
    used = [name for name in sources if any(name in stage.weights for stage in stages)]
    streams = {
        name: PackedStream(
            sources[name].documents("train"), seq_len, _own_seed(seed, name), shuffle_sequences=True
        )
        for name in used
    }
    turns = Turns(stages, used, num_batches * batch_size)
    return TextBatches(streams, turns, own, batch_size, num_batches)


class _ConversationBatches:
    """Batches of packed conversations by number, some rows of them."""

    def __init__(
        self, packed: PackedConversations, rows: list[int], size: int, count: int, limit: int | None
    ):
        self._packed, self._rows, self._size = packed, rows, size
        self._count, self._limit = count, limit

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> Batch:
        first = int(number) * self._size
        return self._packed.read([first + row for row in self._rows], self._limit)


def conversation_stream(
    packed: PackedConversations,
    *,
    batch_size: int,
    num_batches: int,
    limit: int | None = None,
    rows: Sequence[int] | None = None,
) -> grain.IterDataset:
    """The training batches, or some rows of them, as those of texts.

    Sequence r of batch i is the sequence iB + r of `packed`; those from `limit` on are padding.
    """
    own = checked_rows(batch_size, rows)
    batches = _ConversationBatches(packed, own, batch_size, num_batches, limit)
    return grain.MapDataset.source(batches).to_iter_dataset(
        grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    )


def checked_rows(batch_size: int, rows: Sequence[int] | None) -> list[int]:
    """The rows of each batch that a host reads: `rows`, or all of them."""
    if batch_size < 1:
        raise UserError(f"batch_size {batch_size} must be 1 or more.")
    own = list(range(batch_size)) if rows is None else [int(row) for row in rows]
    if not own or not all(0 <= row < batch_size for row in own):
        raise UserError(
            f"rows {own} are not within a batch of {batch_size} sequences; give numbers below that."
        )
    return own


def _own_seed(seed: int, name: str) -> int:
    """A seed for one source, so that adding another leaves its order alone."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _check_stages(sources: Mapping[str, TokenSet], stages: Sequence[Stage]) -> None:
    if not stages:
        raise UserError("the mixture has no stages; give at least Stage(until=1.0, weights=...).")
    before = 0.0
    for number, stage in enumerate(stages, start=1):
        if not before < stage.until <= 1:
            raise UserError(
                f"stage {number} ends at {stage.until}, which is not above {before} and up to 1; "
                "give stages whose `until` grows to 1.0."
            )
        before = stage.until
        if not stage.weights:
            raise UserError(f"stage {number} names no source; give weights such as {{'a': 1.0}}.")
        for name, weight in stage.weights.items():
            if name not in sources:
                raise UserError(
                    f'stage {number} names the source "{name}", which is not there (there are: '
                    f"{', '.join(sources)})."
                )
            if not 0 < weight < float("inf"):
                raise UserError(
                    f'stage {number} gives "{name}" the weight {weight}; weights are positive, '
                    "leave a source out to silence it."
                )
    if before != 1:
        raise UserError(f"the last stage ends at {before}; set its `until` to 1.0.")
