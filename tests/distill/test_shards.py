"""The format of teacher shards, their reader and the stream of batches."""

import json
import shutil
import struct
import zlib

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader

from gemma_jax.distill.records import RecordError, check_targets, decode_record, encode_record
from gemma_jax.distill.shards import TeacherShards, shard_stream
from gemma_jax.distill.verify import verify_teacher_shards
from gemma_jax.errors import UserError

DRAWS = 20


def _random_words(rng, positions, draws, vocab):
    """uint32 [T, N]: sorted draws, counts at the first of equal ids, as the sampler gives them."""
    ids = np.sort(rng.integers(0, vocab, (positions, draws)) ** 2 // vocab, axis=1)
    words = np.zeros((positions, draws), np.uint32)
    for row, values in enumerate(ids):
        unique, first, counts = np.unique(values, return_index=True, return_counts=True)
        words[row, first] = unique | counts << 18
    return words


def _encode(sequence, seed=0, vocab=300, draws=DRAWS, index=3):
    rng = np.random.default_rng(seed)
    T = len(sequence["tokens"])
    words = _random_words(rng, T, draws, vocab)
    logprob = -rng.exponential(size=T).astype(np.float32) * 3
    entropy = rng.exponential(size=T).astype(np.float32)
    content = encode_record(sequence, words, logprob, entropy, record_index=index, draws=draws)
    return content, words, logprob, entropy


@pytest.mark.parametrize("vocab", [300, 2**18])
def test_a_record_comes_back_as_it_was(make_sequences, vocab):
    for seed, sequence in enumerate(make_sequences(4)):
        content, words, logprob, entropy = _encode(sequence, seed, vocab)
        record = decode_record(content)
        check_targets(record, vocab_size=2**18, draws=DRAWS)
        example = record.padded(DRAWS + 2)
        for key in ("tokens", "labels", "segment_ids", "positions", "loss_mask"):
            np.testing.assert_array_equal(example[key], sequence[key])
            assert example[key].dtype == sequence[key].dtype
        kept = sequence["loss_mask"] > 0
        np.testing.assert_array_equal(example["teacher_entropy"][kept], np.float16(entropy[kept]))
        np.testing.assert_allclose(
            example["teacher_label_logprob"][kept], logprob[kept], rtol=5e-4, atol=1e-7
        )
        for t in range(len(kept)):
            used = words[t][words[t] >> 18 > 0] if kept[t] else words[t][:0]
            ids, weights = example["target_ids"][t], example["target_weights"][t]
            np.testing.assert_array_equal(ids[: len(used)], used & (2**18 - 1))
            np.testing.assert_array_equal(weights[: len(used)], np.float32(used >> 18) / DRAWS)
            assert not ids[len(used) :].any()
            assert not weights[len(used) :].any()


def test_a_record_keeps_sequences_that_are_not_plainly_packed(make_sequences):
    """Masked prompts, labels that skip, positions that jump, an extreme log-probability."""
    sequence = {key: value.copy() for key, value in make_sequences(1)[0].items()}
    sequence["loss_mask"][3:9] = 0
    sequence["labels"][10] = 7
    sequence["positions"][15:] += 100
    words = _random_words(np.random.default_rng(0), len(sequence["tokens"]), DRAWS, 300)
    logprob = np.full(len(words), -np.inf, np.float32)
    content = encode_record(
        sequence, words, logprob, np.zeros(len(words)), record_index=0, draws=DRAWS
    )
    example = decode_record(content).padded(DRAWS)
    for key in ("tokens", "labels", "segment_ids", "positions", "loss_mask"):
        np.testing.assert_array_equal(example[key], sequence[key])
    assert example["teacher_label_logprob"][0] == -65504
    assert not example["target_weights"][3:9].any()


def test_any_changed_byte_of_a_record_is_refused(make_sequences):
    content = _encode(make_sequences(1)[0])[0]
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1 << place % 8
        with pytest.raises(RecordError):
            decode_record(bytes(changed))
    for length in (0, 10, 31, 32, len(content) - 1):
        with pytest.raises(RecordError):
            decode_record(content[:length])


def _independent_reader(path):
    """Written from docs/formats.md alone: yields every record of a folder as plain lists."""
    manifest = json.loads((path / "manifest.json").read_text())
    for shard in manifest["shards"]:
        reader = ArrayRecordReader(str(path / shard["name"]))
        for content in reader.read_all():
            magic, version, draws, index, T, K, R, E, crc = struct.unpack("<4sHH6I", content[:32])
            assert (magic, version, draws) == (b"GJTR", 1, manifest["draws"])
            assert zlib.crc32(content[:28] + content[32:]) == crc
            words = struct.unpack_from(f"<{4 * R + T + E}I", content, 32)
            halves = struct.unpack_from(f"<{2 * K}e", content, 32 + 4 * len(words))
            assert len(content) == 32 + 4 * len(words) + 2 * len(halves)
            record = {"index": index, "segment_ids": [], "positions": [], "labels": []}
            record["tokens"] = [word & 0x3FFFF for word in words[4 * R : 4 * R + T]]
            numbers = [word >> 18 for word in words[4 * R : 4 * R + T]]
            for run in range(R):
                length, segment, position, label = words[4 * run : 4 * run + 4]
                start = len(record["labels"])
                record["segment_ids"] += [segment] * length
                record["positions"] += range(position, position + length)
                record["labels"] += [*record["tokens"][start + 1 : start + length], label]
            targets = iter(words[4 * R + T :])
            record["targets"] = [[next(targets) for _ in range(number)] for number in numbers]
            kept = iter(zip(halves[:K], halves[K:], strict=True))
            record["teacher"] = [next(kept) if number else None for number in numbers]
            yield record
        reader.close()


def test_a_reader_written_from_the_documented_format_agrees(shard_folder, make_sequences):
    shards = TeacherShards.open(shard_folder)
    records = list(_independent_reader(shard_folder))
    assert [record["index"] for record in records] == list(range(16))
    for record, sequence in zip(records, make_sequences(16), strict=True):
        example = shards.record(record["index"])
        for key in ("tokens", "labels", "segment_ids", "positions"):
            np.testing.assert_array_equal(record[key], sequence[key])
            np.testing.assert_array_equal(record[key], example[key])
        for t, targets in enumerate(record["targets"]):
            assert bool(targets) == (sequence["loss_mask"][t] > 0)
            weights = {word & 0x3FFFF: (word >> 18) / DRAWS for word in targets}
            slots = example["target_weights"][t] > 0
            theirs = dict(
                zip(
                    example["target_ids"][t][slots],
                    example["target_weights"][t][slots],
                    strict=True,
                )
            )
            assert weights.keys() == theirs.keys()
            for token, weight in weights.items():
                assert theirs[token] == np.float32(weight)
            if targets:
                assert record["teacher"][t] == (
                    example["teacher_label_logprob"][t],
                    example["teacher_entropy"][t],
                )


@pytest.fixture
def folder(shard_folder, tmp_path):
    return shutil.copytree(shard_folder, tmp_path / "copy")


def _shard(folder, number=1):
    return sorted(folder.glob("*.arrayrecord"))[number]


def test_truncated_and_missing_shards_are_refused_by_name(folder):
    shard = _shard(folder)
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(UserError, match=f"{shard.name} holds .* delete that file"):
        TeacherShards.open(folder)
    shard.unlink()
    with pytest.raises(UserError, match=shard.name):
        TeacherShards.open(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match="not finished"):
        TeacherShards.open(folder)
    with pytest.raises(UserError, match="does not exist"):
        TeacherShards.open(folder / "nowhere")


def test_a_flipped_byte_is_refused_at_its_record(folder):
    shard = _shard(folder)
    content = bytearray(shard.read_bytes())
    content[len(content) // 90] ^= 4
    shard.write_bytes(content)
    shards = TeacherShards.open(folder)
    shards.record(0)
    with pytest.raises(UserError, match=f"record . of .*{shard.name} is damaged"):
        shards.__getitems__(range(6, 12))


def test_all_damaged_shards_are_named_at_once(folder):
    files = sorted(folder.glob("*.arrayrecord"))[:2]
    whole = [file.read_bytes() for file in files]
    names = ".*".join(file.name for file in files)
    for file, content in zip(files, whole, strict=True):
        place = len(content) // 90
        file.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
    with pytest.raises(UserError, match=rf"^2 shards are damaged \(record .* delete .*{names}"):
        verify_teacher_shards(folder)
    for file in files:
        file.write_bytes(b"")
    with pytest.raises(UserError, match=rf"^2 shards are damaged .* delete .*{names} and run"):
        TeacherShards.open(folder)


def test_shards_of_another_tokenizer_are_refused(shard_folder):
    shards = TeacherShards.open(shard_folder)
    shards.check_tokenizer("tokenizer")
    with pytest.raises(UserError, match="not another"):
        shards.check_tokenizer("another")


def _take(iterator, number):
    return [next(iterator) for _ in range(number)]


def _assert_equal(batches, others):
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        for key in batch:
            np.testing.assert_array_equal(batch[key], other[key])


def test_the_stream_resumes_exactly(shard_folder):
    stream = shard_stream(TeacherShards.open(shard_folder), batch_size=6, seed=1)
    iterator = iter(stream)
    _take(iterator, 3)
    state = iterator.get_state()
    expected = _take(iterator, 5)
    resumed = iter(stream)
    resumed.set_state(state)
    _assert_equal(expected, _take(resumed, 5))


def test_each_epoch_of_the_stream_holds_each_record_once_in_another_order(shard_folder):
    shards = TeacherShards.open(shard_folder)
    names = {record["tokens"].tobytes(): i for i, record in enumerate(shards)}
    iterator = iter(shard_stream(shards, batch_size=4, seed=1))
    rows = np.concatenate([batch["tokens"] for batch in _take(iterator, 12)])
    order = np.array([names[row.tobytes()] for row in rows]).reshape(3, 16)
    assert np.all(np.sort(order, axis=1) == np.arange(16))
    assert len(np.unique(order, axis=0)) == 3


def test_batches_have_the_promised_arrays(shard_folder):
    shards = TeacherShards.open(shard_folder)
    batch = next(iter(shard_stream(shards, batch_size=3, seed=0)))
    T, M = shards.manifest["seq_len"], shards.max_targets
    runs = [1 + np.count_nonzero(np.diff(record["segment_ids"])) for record in shards]
    assert shards.most_documents == max(runs)
    for key in ("tokens", "labels", "segment_ids", "positions"):
        assert (batch[key].dtype, batch[key].shape) == (np.int32, (3, T))
    for key in ("loss_mask", "teacher_label_logprob", "teacher_entropy"):
        assert (batch[key].dtype, batch[key].shape) == (np.float32, (3, T))
    assert (batch["target_ids"].dtype, batch["target_ids"].shape) == (np.int32, (3, T, M))
    assert (batch["target_weights"].dtype, batch["target_weights"].shape) == (np.float32, (3, T, M))
    np.testing.assert_allclose(batch["target_weights"].sum(-1), batch["loss_mask"], rtol=1e-6)


def test_hosts_together_read_what_one_host_reads(shard_folder):
    shards = TeacherShards.open(shard_folder)
    whole = _take(iter(shard_stream(shards, batch_size=6, seed=2)), 6)
    parts = [
        _take(iter(shard_stream(shards, batch_size=6, seed=2, rows=[2 * h, 2 * h + 1])), 6)
        for h in range(3)
    ]
    joined = [
        {key: np.concatenate([part[k][key] for part in parts]) for key in whole[k]}
        for k in range(6)
    ]
    _assert_equal(whole, joined)
    with pytest.raises(UserError, match="not within a batch of 4"):
        shard_stream(shards, batch_size=4, seed=0, rows=[4])
