"""Drawn tokens and targets are read by the real readers, and look as real ones do."""

from pathlib import Path

import numpy as np

from gemma_jax.bench.inputs import draw_shards, draw_token_set, zipf_tokens
from gemma_jax.data.packing import packed_sequences
from gemma_jax.distill.verify import verify_teacher_shards

V, T = 1000, 64


def test_tokens_follow_zipf() -> None:
    ids = zipf_tokens(200_000, V)
    counts = np.sort(np.bincount(ids, minlength=V))[::-1]
    assert ids.min() > 0
    assert ids.max() < V
    wanted = 200_000 / np.arange(1, V) / (1 / np.arange(1, V)).sum()
    np.testing.assert_allclose(counts[:20], wanted[:20], rtol=0.1)
    np.testing.assert_array_equal(ids, zipf_tokens(200_000, V))


def packed(folder: Path, documents: int) -> np.ndarray:
    """segment_ids [sequences, T]."""
    tokens = draw_token_set(
        folder, vocab_size=V, seq_len=T, documents=documents, sequences=64, seed=0
    )
    sequences = packed_sequences(tokens, "train", T)
    batch = sequences.read(range(len(sequences) - 1))
    assert (batch["loss_mask"] == 1).all()
    assert len(np.unique(batch["tokens"])) > V / 4
    return batch["segment_ids"]


def test_one_document_fills_each_sequence(tmp_path: Path) -> None:
    assert (packed(tmp_path, 1) == 1).all()


def test_sequences_hold_so_many_documents_on_average(tmp_path: Path) -> None:
    assert abs(packed(tmp_path, 6).max(axis=1).mean() - 6) < 0.7


def test_targets_are_those_of_64_draws(tmp_path: Path) -> None:
    tokens = draw_token_set(
        tmp_path / "t", vocab_size=V, seq_len=T, documents=1, sequences=64, seed=0
    )
    shards = draw_shards(tmp_path / "s", tokens, vocab_size=V, seq_len=T, seed=0)
    found = verify_teacher_shards(tmp_path / "s")  # ids ascend, counts add up
    assert found["records"] == len(shards) == 64
    assert shards.max_targets == 64
    mean = shards.manifest["unique_ids"] / shards.manifest["num_tokens"]
    assert 17 < mean < 22
    ids = shards.record(0)["target_ids"]
    assert ids.max() > 0.9 * V
