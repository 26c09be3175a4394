"""Which checkpoints of a run are kept besides the last ones."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from orbax.checkpoint import checkpoint_managers

BEST_METRIC = "valid/bits_per_byte"


def score(metrics: Any) -> float:
    """What the best checkpoint has least of; infinite for one that was not validated."""
    return metrics.get(BEST_METRIC, math.inf) if isinstance(metrics, dict) else math.inf


class Best(checkpoint_managers.PreservationPolicy):
    """Keeps the `n` best checkpoints, of those alone that were validated.

    Orbax's own `BestN` asks for metrics in all or warns at each checkpoint without.
    """

    def __init__(self, n: int) -> None:
        self._n = n

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        validated = [one for one in checkpoints if math.isfinite(score(one.metrics))]
        best = sorted(validated, key=lambda one: score(one.metrics))[: self._n]
        return [one in best for one in checkpoints]


class Before(checkpoint_managers.PreservationPolicy):
    """Keeps the last checkpoint before each bad step."""

    def __init__(self, bad_steps: Callable[[], Sequence[int]]) -> None:
        self._bad_steps = bad_steps

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = [one.step for one in checkpoints]
        kept = {max((s for s in steps if s < bad), default=None) for bad in self._bad_steps()}
        return [step in kept for step in steps]
