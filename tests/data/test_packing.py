"""Packing and the training stream: every pair once, exact resume, hosts, weights."""

import collections
import itertools
import json
import math
from pathlib import Path

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest

from gemma_jax.data.loader import Turns, train_batches
from gemma_jax.data.mixture import Mixture, Stage, open_sources
from gemma_jax.data.packing import PackedPass, PackedStream, packed_sequences, shuffled
from gemma_jax.data.tokenizer import TokenizerConfig
from gemma_jax.data.tokens import Corpus, TokenSet, build_tokens
from gemma_jax.errors import UserError

DTYPES = {
    "tokens": np.int32,
    "labels": np.int32,
    "segment_ids": np.int32,
    "positions": np.int32,
    "loss_mask": np.float32,
}


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TokenSet]:
    """Three sources of one tokenizer; `few` has fewer documents than a batch has rows."""
    root = tmp_path_factory.mktemp("packing")
    built: dict[str, TokenSet] = {}
    for name, count in (("many", 90), ("more", 40), ("few", 3)):
        lines = [
            json.dumps({"text": f"{name} {i} " + f"word{i} " * (i * 7 % 23)}) for i in range(count)
        ]
        (root / f"{name}.jsonl").write_text("\n".join(lines))
        built[name] = build_tokens(
            Corpus(
                path=str(root / name),
                sources=(str(root / f"{name}.jsonl"),),
                tokenizer=str(built["many"].path) if built else TokenizerConfig(vocab_size=400),
                valid_fraction=0.1,
                shard_bytes=2000,
            )
        )
    return built


class Distinct:
    """Stands for documents in which no id comes twice, so that a token tells where it is from."""

    def __init__(self, *lengths: int):
        self.lengths = np.array(lengths)
        self._ends = np.cumsum(lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    def read(self, numbers):
        return [np.arange(self._ends[n] - self.lengths[n], self._ends[n]) for n in numbers]

    @property
    def inputs(self) -> list[int]:
        """Every id that has a next one in its document."""
        return sorted(set(range(self._ends[-1])) - set((self._ends - 1).tolist()))


def check_sequence(sequence, documents: Distinct) -> list[int]:
    """Holds one sequence [T] against the contract and returns its inputs."""
    T = len(sequence["tokens"])
    assert {name: array.dtype for name, array in sequence.items()} == DTYPES
    assert all(array.shape == (T,) for array in sequence.values())
    real = sequence["segment_ids"] > 0
    assert np.array_equal(sequence["loss_mask"], real.astype(np.float32))
    assert np.all(np.diff(real.astype(int)) <= 0), "padding comes last"
    assert all((array[~real] == 0).all() for array in sequence.values())
    inputs, segments = sequence["tokens"][real], sequence["segment_ids"][real]
    assert np.array_equal(sequence["labels"][real], inputs + 1), "the label is the next token"
    assert set(inputs.tolist()) <= set(documents.inputs), "and of the same document"
    new = np.diff(segments, prepend=0)
    assert set(new.tolist()) <= {0, 1}
    assert np.all(np.diff(inputs)[new[1:] == 0] == 1), "a segment is one stretch of a document"
    starts = np.flatnonzero(new)
    assert np.array_equal(
        sequence["positions"][real], np.arange(len(inputs)) - starts[segments - 1]
    )
    first_tokens = documents._ends - documents.lengths
    assert set(inputs[starts[1:]].tolist()) <= set(first_tokens.tolist())
    return inputs.tolist()


@pytest.mark.parametrize("seq_len", [2, 3, 17, 64, 5000])
@pytest.mark.parametrize("lengths", [(2,), (9, 2, 31, 2, 2, 150, 5), tuple(range(2, 40))])
def test_one_pass_gives_every_pair_once(seq_len: int, lengths: tuple[int, ...]) -> None:
    documents = Distinct(*lengths)
    whole = PackedPass(PackedStream(documents, seq_len, 3, shuffle_sequences=False))
    found = [check_sequence(sequence, documents) for sequence in whole]
    assert all(len(inputs) == seq_len for inputs in found[:-1]), "only the last one is padded"
    assert sorted(itertools.chain(*found)) == documents.inputs
    assert whole.pairs == len(documents.inputs)


def test_pass_has_random_access_and_obeys_its_seed(sets) -> None:
    first, again, other = (packed_sequences(sets["many"], "train", 32, seed=s) for s in (1, 1, 2))
    for number in (len(first) - 1, 0, 3):
        np.testing.assert_equal(first[number], again[number])
    assert any((a["tokens"] != b["tokens"]).any() for a, b in zip(first, other, strict=True))
    rows = first.read([2, 0, len(first)])
    np.testing.assert_array_equal(rows["tokens"][0], first[2]["tokens"])
    assert not rows["loss_mask"][2].any()
    with pytest.raises(IndexError):
        first[len(first)]


@pytest.mark.parametrize("seq_len", [2, 3, 16, 100, 700])
@pytest.mark.parametrize("lengths", [(4,), (9, 2, 31, 2, 2, 150, 5)])
def test_endless_stream_gives_every_pair_once_an_epoch(
    seq_len: int, lengths: tuple[int, ...]
) -> None:
    """Over as many epochs as end with a sequence, each pair comes that often."""
    documents = Distinct(*lengths)
    stream = PackedStream(documents, seq_len, 5, shuffle_sequences=True)
    epochs = seq_len // math.gcd(seq_len, stream.pairs)
    count = epochs * stream.pairs // seq_len
    batch = stream.read(range(count))
    rows = [{name: array[n] for name, array in batch.items()} for n in range(count)]
    found = [check_sequence(row, documents) for row in rows]
    assert all(len(inputs) == seq_len for inputs in found), "every sequence is full"
    assert collections.Counter(itertools.chain(*found)) == dict.fromkeys(documents.inputs, epochs)


def test_epochs_differ_and_sequences_are_shuffled(sets) -> None:
    stream = PackedStream(sets["many"].documents("train"), 32, 0, shuffle_sequences=True)
    count = stream.pairs // 32 - 1
    places = [stream._place(n) for n in range(count)]
    assert sorted(places) != places
    one, two = (
        stream.read(range(count))["tokens"],
        stream.read(range(count + 2, 2 * count))["tokens"],
    )
    assert not np.array_equal(one[: len(two)], two)


def test_shuffle_is_the_same_everywhere() -> None:
    """A golden: another NumPy must not change the order of a run."""
    assert shuffled(10, 1, 2).tolist() == [8, 7, 5, 6, 1, 4, 3, 0, 2, 9]
    assert sorted(shuffled(1000, 7)) == list(range(1000))
    assert (shuffled(100, 1, 2) != shuffled(100, 2, 1)).any()


def stream(sets, seed=0, **options):
    stages = [
        Stage(until=0.5, weights={"many": 3, "few": 1}),
        Stage(until=1.0, weights={"more": 1}),
    ]
    settings = {"seq_len": 16, "batch_size": 8, "num_batches": 20, "seed": seed, **options}
    return train_batches(sets, stages, **settings).stream()


def test_batches_have_the_promised_form(sets) -> None:
    batches = list(stream(sets))
    assert len(batches) == 20
    for batch in batches:
        assert {name: array.dtype for name, array in batch.items()} == DTYPES
        assert all(a.shape == (8, 16) and a.flags.c_contiguous for a in batch.values())
        assert (batch["loss_mask"] == 1).all()


def test_order_is_a_function_of_the_seed(sets) -> None:
    np.testing.assert_equal(list(stream(sets)), list(stream(sets)))
    first, other = next(iter(stream(sets))), next(iter(stream(sets, seed=1)))
    assert (first["tokens"] != other["tokens"]).any()


@pytest.mark.parametrize("after", [0, 1, 9, 13, 20])
def test_resumes_exactly(sets, after: int) -> None:
    batches = list(stream(sets))
    iterator = iter(stream(sets))
    for _ in range(after):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    fresh = iter(stream(sets))
    next(fresh)
    fresh.set_state(state)
    np.testing.assert_equal(list(fresh), batches[after:])


def test_state_travels_in_a_checkpoint(sets, tmp_path: Path) -> None:
    iterator = iter(stream(sets))
    for _ in range(3):
        next(iterator)
    with ocp.CheckpointManager(tmp_path) as manager:
        save = grain.checkpoint.CheckpointSave(iterator)
        manager.save(3, args=ocp.args.Composite(data=save))
        manager.wait_until_finished()
        fresh = iter(stream(sets))
        restore = grain.checkpoint.CheckpointRestore(fresh)
        manager.restore(3, args=ocp.args.Composite(data=restore))
    np.testing.assert_equal(next(fresh), next(iterator))


@pytest.mark.parametrize("rows", [[0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 4, 5], [3]])
def test_a_host_reads_its_rows_of_the_global_batch(sets, rows: list[int]) -> None:
    for whole, own in zip(stream(sets), stream(sets, rows=rows), strict=True):
        for name in whole:
            np.testing.assert_array_equal(whole[name][rows], own[name])


def test_weights_hold_in_each_stage() -> None:
    stages = [
        Stage(until=0.8, weights={"a": 0.7, "b": 0.2, "c": 0.1}),
        Stage(until=0.9, weights={"c": 1}),
        Stage(until=1.0, weights={"b": 1, "a": 2}),
    ]
    mixture = Turns(stages, ["a", "b", "c"], 1000)
    drawn = [mixture.locate(n) for n in range(1000)]
    names = [name for name, _ in drawn]
    for start, end, weights in (
        (0, 800, [0.7, 0.2, 0.1]),
        (800, 900, [0, 0, 1]),
        (900, 1000, [2 / 3, 1 / 3, 0]),
    ):
        for n in range(start, end):
            for name, weight in zip("abc", weights, strict=True):
                count = names[start : n + 1].count(name)
                assert abs(count - weight * (n + 1 - start)) <= 1.5
    for name in "abc":  # each source goes on where it was
        numbers = [number for n, number in drawn if n == name]
        assert numbers == list(range(len(numbers)))


@pytest.mark.parametrize("weight", [1e-9, 1 / 3, 0.1, 1 - 1e-9])
def test_mixture_is_exact_far_out(weight: float) -> None:
    stages = [Stage(until=1.0, weights={"a": weight, "b": 1 - weight})]
    mixture = Turns(stages, ["a", "b"], 10**12)
    last = dict.fromkeys("ab", -1)
    for n in range(10**12 - 300, 10**12):
        name, number = mixture.locate(n)
        assert last[name] in (-1, number - 1)
        last[name] = number


def test_another_source_leaves_the_order_of_the_first_alone(sets) -> None:
    alone = Stage(until=1.0, weights={"many": 1})
    both = Stage(until=1.0, weights={"more": 1, "many": 1})
    options = {"seq_len": 16, "batch_size": 1, "num_batches": 8, "seed": 0}
    mixed = [b["tokens"].tolist() for b in train_batches(sets, [both], **options).stream()]
    single = [b["tokens"].tolist() for b in train_batches(sets, [alone], **options).stream()]
    assert [rows for rows in mixed if rows in single] == single[:4]


def _most_runs(rows) -> int:
    return max(1 + int(np.count_nonzero(np.diff(row))) for row in rows)


@pytest.mark.parametrize("seq_len", [2, 7, 64, 100])
def test_the_most_documents_of_a_sequence_are_known_beforehand(sets, seq_len) -> None:
    """Counted from lengths alone, over epochs that begin and end anywhere in a sequence."""
    for name in ("many", "few"):
        packed = PackedStream(sets[name].documents("train"), seq_len, 3, shuffle_sequences=True)
        whole = 3 * packed.pairs // seq_len
        rows = packed.read(range(whole))["segment_ids"]
        assert packed.most_documents(whole) == _most_runs(rows)
        assert packed.most_documents(1) >= _most_runs(rows[:1])
        once = packed_sequences(sets[name], "train", seq_len)
        assert once.most_documents() == _most_runs([s["segment_ids"] for s in once])


def test_the_most_documents_of_a_mixture_are_those_of_its_sources(sets) -> None:
    stages = [Stage(until=1.0, weights={"many": 1.0, "few": 1.0})]
    batches = train_batches(sets, stages, seq_len=64, batch_size=4, num_batches=40, seed=0)
    found = _most_runs([row for batch in batches.stream() for row in batch["segment_ids"]])
    assert found <= batches.most_documents() < 3 * found


def test_bad_mixtures_and_sizes_are_refused(sets, tmp_path: Path) -> None:
    def refuse(message: str, stages, **options) -> None:
        settings = {"seq_len": 16, "batch_size": 8, "num_batches": 20, "seed": 0, **options}
        with pytest.raises(UserError, match=message):
            train_batches(sets, stages, **settings).stream()

    good = [Stage(until=1.0, weights={"many": 1})]
    refuse("no stages", [])
    refuse(
        r'"absent", which is not there \(there are: many, more, few\)',
        [Stage(until=1.0, weights={"absent": 1})],
    )
    refuse("weights are positive", [Stage(until=1.0, weights={"many": 0})])
    refuse("weights are positive", [Stage(until=1.0, weights={"many": float("nan")})])
    refuse("names no source", [Stage(until=1.0, weights={})])
    refuse("stage 2 ends at 0.5", [Stage(until=0.5, weights={"many": 1})] * 2)
    refuse(r"ends at 1\.5", [Stage(until=1.5, weights={"many": 1})])
    refuse("set its `until` to 1.0", [Stage(until=0.5, weights={"many": 1})])
    refuse("seq_len 1 is too short", good, seq_len=1)
    refuse(r"rows \[7, 8\] are not within a batch of 8", good, rows=[7, 8])
    refuse("num_batches 0 must be 1 or more", good, num_batches=0)
    refuse("batch_size 0 must be 1 or more", good, batch_size=0)

    source = str(sets["few"].manifest["sources"][0]["name"])
    other = Corpus(
        path=str(tmp_path / "x"), sources=(source,), tokenizer=TokenizerConfig(vocab_size=390)
    )
    build_tokens(other)
    mixed = Mixture(sources={"many": str(sets["many"].path), "other": other}, stages=tuple(good))
    with pytest.raises(UserError, match=r"another tokenizer .* than source 'many'"):
        open_sources(mixed)
