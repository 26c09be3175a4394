"""The teacher's job: what it writes, that a kill leaves no trace, and its verification."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from gemma_jax.distill import head
from gemma_jax.distill.shards import TeacherShards
from gemma_jax.distill.teacher import TeacherJob
from gemma_jax.distill.verify import verify_teacher_shards
from gemma_jax.errors import UserError
from gemma_jax.files import locked
from gemma_jax.sharding import MeshConfig, make_layout


def _files(folder):
    files = (file for file in sorted(Path(folder).iterdir()) if file.name != ".lock")
    return {file.name: file.read_bytes() for file in files}


def _teacher_probabilities(params, sequence):
    embedding = np.asarray(params["embedding"], np.float64)
    hidden = embedding[sequence["tokens"]]
    before = np.vstack([np.zeros_like(hidden[:1]), hidden[:-1]])
    logits = (hidden + before * (sequence["positions"] > 0)[:, None]) @ embedding.T
    p = np.exp(logits - logits.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True)


def test_shards_hold_the_teachers_distribution(shard_folder, params, make_sequences):
    shards = TeacherShards.open(shard_folder)
    cross_entropy, entropies, tokens = 0.0, 0.0, 0
    for index, sequence in enumerate(make_sequences(16)):
        example = shards.record(index)
        p = _teacher_probabilities(params, sequence)
        kept = sequence["loss_mask"] > 0
        logprob = np.log(p[np.arange(len(p)), sequence["labels"]])
        entropy = -(p * np.log(np.maximum(p, 1e-300))).sum(1)
        np.testing.assert_allclose(
            example["teacher_label_logprob"][kept], logprob[kept], rtol=1e-3, atol=1e-4
        )
        np.testing.assert_allclose(
            example["teacher_entropy"][kept], entropy[kept], rtol=1e-3, atol=1e-4
        )
        # Systematic draws: every count is N p rounded down or up.
        counts = np.zeros_like(p)
        np.add.at(
            counts,
            (np.arange(len(p))[:, None], example["target_ids"]),
            example["target_weights"] * 20,
        )
        assert np.all(np.abs(counts - 20 * p)[kept] < 1.01)
        cross_entropy -= logprob[kept].sum()
        entropies += entropy[kept].sum()
        tokens += kept.sum()
    manifest = shards.manifest
    assert manifest["num_tokens"] == tokens
    assert manifest["teacher_cross_entropy"] == pytest.approx(cross_entropy / tokens, rel=1e-3)
    assert manifest["teacher_entropy"] == pytest.approx(entropies / tokens, rel=1e-3)


def test_chunks_batches_and_devices_do_not_change_the_draws(
    tmp_path, shard_folder, make_teacher, make_sequences, write, monkeypatch
):
    """Of the head only: the hidden states of this teacher do not depend on the batch."""
    sequences = make_sequences(16)
    expected = [TeacherShards.open(shard_folder).record(i) for i in range(16)]
    monkeypatch.setattr(head, "_MAX_LOGITS", 300 * 5 * 7)
    others = {
        "chunks": make_teacher(tmp_path / "chunks", batch_size=5, records_per_shard=16),
        "devices": make_teacher(tmp_path / "devices", make_layout(MeshConfig()), batch_size=8),
        "both": make_teacher(tmp_path / "both", make_layout(MeshConfig(fsdp=2, tensor=4))),
        "vocabulary": make_teacher(tmp_path / "vocabulary", make_layout(MeshConfig(tensor=8))),
    }
    for name, teacher in others.items():
        write(teacher, sequences)
        differing = 0
        for example, other in zip(expected, TeacherShards.open(tmp_path / name), strict=True):
            differing += int(np.any(example["target_weights"] != other["target_weights"], 1).sum())
            np.testing.assert_allclose(
                example["teacher_entropy"], other["teacher_entropy"], rtol=1e-3, atol=1e-5
            )
        assert differing == 0


class _KilledError(Exception):
    pass


def _killed_at(sequences, place):
    for index, sequence in enumerate(sequences):
        if index == place:
            raise _KilledError
        yield sequence


def test_an_interrupted_job_ends_with_the_same_bytes(
    tmp_path, shard_folder, make_teacher, make_sequences, write
):
    sequences = make_sequences(16)
    teacher = make_teacher(tmp_path)
    for place in (0, 3, 7, 13):
        with pytest.raises(_KilledError):
            write(teacher, _killed_at(sequences, place), num_sequences=16)
        assert not (tmp_path / "manifest.json").exists()
        with pytest.raises(UserError, match="not finished"):
            TeacherShards.open(tmp_path)
    manifest = write(teacher, sequences)
    assert {n: c for n, c in _files(tmp_path).items() if not n.endswith(".partial")} == _files(
        shard_folder
    )
    assert write(teacher, _killed_at(sequences, 0), num_sequences=16) == manifest
    # A lost shard is written again, the same.
    sorted(tmp_path.glob("*.arrayrecord"))[1].unlink()
    write(teacher, sequences)
    assert _files(tmp_path) == _files(shard_folder)


def test_a_second_process_waits_for_the_first(tmp_path, make_teacher, make_sequences, write):
    """The lock is held by an open file: another one in this process waits as a process would."""
    second = threading.Thread(
        target=write, args=(make_teacher(tmp_path), make_sequences(16)), daemon=True
    )
    with locked(tmp_path):
        second.start()
        second.join(timeout=0.3)
        assert not (tmp_path / "job.json").exists()
    second.join(timeout=60)
    assert len(TeacherShards.open(tmp_path)) == 16


def test_kill_9_at_any_moment(tmp_path, shard_folder):
    """Runs the job in a process of its own, slowed down; kills it before and after a shard."""
    script = Path(__file__).with_name("slow_teacher.py")
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    command = [sys.executable, str(script), str(tmp_path)]
    for num_shards in (0, 1):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()  # the job begins
        deadline = time.monotonic() + 60
        while len(list(tmp_path.glob("*.arrayrecord"))) < num_shards:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert process.poll() is None
        process.kill()
        process.wait()
        process.stdout.close()
        assert not (tmp_path / "manifest.json").exists()
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    assert _files(tmp_path) == _files(shard_folder)


@pytest.mark.parametrize(
    ("job_changes", "call_changes", "name"),
    [
        ({"draws": 21}, {}, "draws = 20, not 21"),
        ({"method": "multinomial"}, {}, "method"),
        ({"seed": 1}, {}, "seed"),
        ({}, {"teacher_hash": "other"}, "teacher_hash"),
        ({}, {"tokenizer_hash": "other"}, "tokenizer_hash"),
        ({}, {"num_sequences": 15}, "num_records"),
    ],
)
def test_another_job_in_the_same_folder_is_refused(
    shard_folder, make_teacher, make_sequences, write, job_changes, call_changes, name
):
    with pytest.raises(UserError, match=name):
        write(make_teacher(shard_folder, **job_changes), make_sequences(16), **call_changes)


def test_bad_input_is_one_sentence(
    tmp_path, shard_folder, params, make_teacher, make_sequences, write
):
    sequences = make_sequences(16)
    for changes in ({"draws": 0}, {"draws": 2**14}, {"method": "top"}, {"batch_size": 0}):
        with pytest.raises(UserError, match="="):
            TeacherJob(path="x", **changes)
    teacher = make_teacher(tmp_path / "new")
    with pytest.raises(UserError, match="300 ids and the tokenizer 301"):
        write(teacher, sequences, vocab_size=301)
    with pytest.raises(UserError, match="no sequence"):
        write(teacher, [])
    with pytest.raises(UserError, match="hold 16 sequences, not 20"):
        write(teacher, sequences, num_sequences=20)
    with pytest.raises(UserError, match="not seq_len = 99"):
        write(make_teacher(tmp_path / "long"), sequences, seq_len=99)
    foreign = make_sequences(16)
    foreign[9]["labels"][4] = 300
    with pytest.raises(UserError, match="sequence 9 holds id 300"):
        write(make_teacher(tmp_path / "foreign"), foreign)
    with pytest.raises(UserError, match="does not divide over the 8 devices"):
        make_teacher(tmp_path / "mesh", make_layout(MeshConfig()), batch_size=12)
    copy = shutil.copytree(shard_folder, tmp_path / "copy")
    (copy / "manifest.json").unlink()
    with pytest.raises(UserError, match="another sequence"):
        write(make_teacher(copy), make_sequences(16, seed=1))
    ill = make_teacher(tmp_path / "ill")
    ill._params = {"embedding": params["embedding"].at[40].set(np.nan)}
    with pytest.raises(UserError, match="not finite"):
        write(ill, sequences)


def test_verify_reports_and_draws_the_same_again(shard_folder, make_teacher):
    report = verify_teacher_shards(shard_folder, recompute=make_teacher("unused"), sample=7)
    assert report["records"] == 16
    assert report["tokens"] == 16 * 24 - 5
    assert report["recomputed_records"] == 7
    assert report["differing_tokens"] == 0
    assert report["max_logprob_difference_nats"] < 1e-2
    assert 1 < report["unique_ids_per_token"] <= report["max_unique_ids"] <= 20
    assert report["teacher_cross_entropy_nats"] > 0
    assert report["bytes_per_token"] > 4


def test_verify_sees_another_teacher(shard_folder, make_teacher, params):
    other = make_teacher("unused")
    other._params = {"embedding": params["embedding"] * 1.1}
    with pytest.raises(UserError, match=r"of 91 tokens drawn again \d\d differ"):
        verify_teacher_shards(shard_folder, recompute=other, sample=4)


def test_verify_sees_another_seed_and_another_probability(shard_folder, make_teacher):
    with pytest.raises(UserError, match="check its seed"):
        verify_teacher_shards(shard_folder, recompute=make_teacher("unused", seed=1), sample=4)
    teacher = make_teacher("unused")

    def shifted(sequences, indices):
        output = teacher(sequences, indices)
        return output._replace(label_logprob=output.label_logprob - 0.2)

    with pytest.raises(UserError, match=r"0 differ, and log-probabilities by up to 0\.2"):
        verify_teacher_shards(shard_folder, recompute=shifted, sample=4)


def test_verify_refuses_damage(tmp_path, shard_folder):
    copy = shutil.copytree(shard_folder, tmp_path / "copy")
    shards = sorted(copy.glob("*.arrayrecord"))
    manifest = json.loads((copy / "manifest.json").read_text())

    shards[0].write_bytes(shards[1].read_bytes())
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"record 0 of .*00000-of-00003.*it is record 6 of the job"):
        verify_teacher_shards(copy)

    shutil.copy(shard_folder / shards[0].name, shards[0])
    content = bytearray(shards[2].read_bytes())
    content[-1] ^= 1  # padding: no record is hurt
    shards[2].write_bytes(content)
    with pytest.raises(UserError, match=r"00002-of-00003.*SHA-256"):
        verify_teacher_shards(copy)

    shutil.copy(shard_folder / shards[2].name, shards[2])
    (copy / "manifest.json").write_text(json.dumps(manifest | {"token_hash": "0"}))
    with pytest.raises(UserError, match="token_hash"):
        verify_teacher_shards(copy)
