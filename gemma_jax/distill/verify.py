"""Re-reading teacher shards: every byte, every promise of the format, and a sample drawn again."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gemma_jax.distill.records import (
    ID_BITS,
    LOWEST_LOGPROB,
    Record,
    RecordError,
    check_targets,
)
from gemma_jax.distill.shards import (
    MANIFEST,
    DamagedShardError,
    TeacherShards,
    Totals,
    refuse_damaged,
)
from gemma_jax.errors import UserError
from gemma_jax.files import file_hash
from gemma_jax.progress import progress

_GROUP = 8  # records drawn again at once
_MEAN_GAP = 0.05  # nats; one token counts with a hundred times that at most

Recompute = Callable[[Sequence[dict[str, np.ndarray]], Sequence[int]], Any]


def verify_teacher_shards(
    path: str | Path,
    *,
    recompute: Recompute | None = None,
    sample: int = 32,
    tolerated: float = 0.01,
) -> dict[str, Any]:
    """Reads all shards in `path`; raises UserError naming the shards that are damaged.

    Checked: checksums, record indices 0..n-1 each once, counts adding up to N at each kept
    position, ids ascending and below V, totals and token hash of the manifest. `recompute` is a
    `Teacher` built with the settings of the shards: `sample` records, spread evenly, are drawn
    again and compared; a share of differing tokens above `tolerated` is refused. Returns figures;
    their names carry the units.
    """
    shards = TeacherShards.open(path)
    manifest = shards.manifest
    totals = Totals()
    damaged: dict[Path, DamagedShardError] = {}
    with progress("verify", len(shards)) as advance:
        for index in range(len(shards)):
            try:
                if shards.locate(index)[0].file not in damaged:
                    totals.add(_checked_record(shards, index))
            except DamagedShardError as error:
                damaged[error.file] = error
            advance(1)
    refuse_damaged(list(damaged.values()))
    found = totals.fields()
    for key, value in found.items():
        if manifest.get(key) != value:
            raise UserError(
                f"{shards.path / MANIFEST} says {key} = {manifest.get(key)} and the records hold "
                f"{value}; delete the manifest and run the teacher again."
            )
    for shard in manifest["shards"]:
        if file_hash(shards.path / shard["name"]) != shard["sha256"]:
            raise UserError(
                f"{shards.path / shard['name']} is not the file that the manifest names (its "
                "SHA-256 differs, though its records are intact); delete it and run the "
                "teacher again."
            )
    tokens = max(totals.num_tokens, 1)
    report: dict[str, Any] = {
        "records": len(shards),
        "tokens": totals.num_tokens,
        "bytes_per_token": manifest["bytes"] / tokens,
        "unique_ids_per_token": totals.unique_ids / tokens,
        "max_unique_ids": totals.max_targets,
        "teacher_cross_entropy_nats": found["teacher_cross_entropy"],
        "teacher_entropy_nats": found["teacher_entropy"],
    }
    if recompute is not None:
        report |= _draw_again(shards, recompute, sample, tolerated)
    return report


def _checked_record(shards: TeacherShards, index: int) -> Record:
    shard, place = shards.locate(index)
    record = shard.record(place)
    manifest = shards.manifest
    try:
        if record.record_index != index:
            raise RecordError(f"it is record {record.record_index} of the job, not {index}")
        if len(record.tokens) != manifest["seq_len"]:
            raise RecordError(f"it holds {len(record.tokens)} positions")
        check_targets(record, vocab_size=manifest["vocab_size"], draws=manifest["draws"])
    except RecordError as error:
        raise shard.damaged(place, error) from None
    return record


def _draw_again(
    shards: TeacherShards, recompute: Recompute, sample: int, tolerated: float
) -> dict[str, Any]:
    """Compares a sample with fresh draws. Half precision alone makes log-probabilities differ by
    0.05 %; another device's rounding moves a draw in perhaps one token of ten thousand."""
    indices = np.unique(np.linspace(0, len(shards) - 1, min(sample, len(shards))).astype(int))
    compared = differing = 0
    gap = total_gap = 0.0
    for start in range(0, len(indices), _GROUP):
        batch = [int(index) for index in indices[start : start + _GROUP]]
        records = [shards.raw_record(index) for index in batch]
        output = recompute([record.padded(shards.max_targets) for record in records], batch)
        for row, record in enumerate(records):
            kept = record.num_targets > 0
            words = output.words[row]
            used = words >> ID_BITS > 0
            stored = record.ids.astype(np.uint32) | record.counts.astype(np.uint32) << ID_BITS
            width = words.shape[1]
            fresh = _rows(used.sum(axis=1), words[used], width)
            differs = np.any(fresh != _rows(record.num_targets, stored, width), axis=1)
            differing += int(np.sum(differs & kept))
            logprob = np.maximum(output.label_logprob[row][kept], LOWEST_LOGPROB)
            difference = np.abs(logprob - record.label_logprob.astype(np.float32))
            gap = max(gap, float(difference.max(initial=0.0)))
            total_gap += float(np.minimum(difference, _MEAN_GAP * 100).sum())
            compared += int(kept.sum())
    if differing > tolerated * compared or total_gap > _MEAN_GAP * compared:
        raise UserError(
            f"{shards.path} does not hold what its teacher gives now: of {compared} tokens drawn "
            f"again {differing} differ, and log-probabilities by up to {gap:.3g} nats; check its "
            "seed, draws and method, or write it anew."
        )
    return {
        "recomputed_records": len(indices),
        "recomputed_tokens": compared,
        "differing_tokens": differing,
        "max_logprob_difference_nats": gap,
    }


def _rows(lengths: np.ndarray, flat: np.ndarray, width: int) -> np.ndarray:
    """[T, width] from rows of `lengths` [T] laid end to end, filled up with zeros."""
    rows = np.zeros((len(lengths), width), flat.dtype)
    rows[np.arange(width) < lengths[:, None]] = flat
    return rows
