"""What a quickstart says where it cannot say all."""

from pathlib import Path

import pytest

from gemma_jax import quickstart
from gemma_jax.errors import UserError


def test_an_installation_without_a_checkout(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert quickstart.default_file().exists()
    monkeypatch.setattr(quickstart, "FILE", tmp_path / "quickstart.py")
    with pytest.raises(UserError, match="of a checkout"):
        quickstart.default_file()


def test_a_report_of_a_run_too_short_to_be_timed() -> None:
    bits = {"teacher": 1.0, "scratch": 2.0, "distilled": 1.5}
    numbers = {"tokens_per_s": None, "shard_bytes_per_token": 1, "unique_ids_per_token": 1}
    summary = {"bits_per_byte": bits, **numbers, "wall_s": 1, "plot": "p", "samples": {}}
    assert "training speed   0 tokens/s" in quickstart.report(summary)
