"""Optimizers and learning-rate schedules, built from optax.

Parameters are told apart by their logical axes: embeddings carry "vocab", matrices have at least
two axes beside the stacked "layers", the rest are norms.
"""

import dataclasses
from typing import Any, Literal, get_args

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon

from gemma_jax.errors import require_fractions, require_positive
from gemma_jax.settings import check_types

Kind = Literal["matrix", "embedding", "norm"]
type Axes = tuple[str | None, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class WarmupStableDecay:
    """Linear warmup, a plateau, linear decay (arXiv 2404.06395). Fractions of all steps."""

    warmup: float = 0.02
    decay: float = 0.5
    final: float = 0.0  # last learning rate, as a fraction of the peak

    def __post_init__(self) -> None:
        check_types(self)
        require_fractions(self, "warmup", "decay", "final")

    def build(self, peak: float, steps: int) -> optax.Schedule:
        warmup, decay = _warmup_steps(self.warmup, steps), max(1, round(self.decay * steps))
        decay = min(decay, steps - warmup) or 1
        return optax.join_schedules(
            [
                optax.linear_schedule(peak / warmup, peak, warmup),
                optax.constant_schedule(peak),
                optax.linear_schedule(peak, peak * self.final, decay),
            ],
            [warmup, steps - decay],
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cosine:
    """Linear warmup, then half a cosine (arXiv 1608.03983). Fractions of all steps and the peak."""

    warmup: float = 0.02
    final: float = 0.1

    def __post_init__(self) -> None:
        check_types(self)
        require_fractions(self, "warmup", "final")

    def build(self, peak: float, steps: int) -> optax.Schedule:
        warmup = _warmup_steps(self.warmup, steps)
        return optax.join_schedules(
            [
                optax.linear_schedule(peak / warmup, peak, warmup),
                optax.cosine_decay_schedule(peak, max(1, steps - warmup), alpha=self.final),
            ],
            [warmup],
        )


type Schedule = WarmupStableDecay | Cosine


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW:
    """Adam with decoupled weight decay (arXiv 1711.05101); the decay is scaled by the rate."""

    learning_rate: float = 1e-3
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    decayed: tuple[Kind, ...] = ("matrix", "embedding")
    clip_norm: float | None = 1.0
    schedule: WarmupStableDecay | Cosine = WarmupStableDecay()

    def __post_init__(self) -> None:
        check_types(self)
        require_positive(self, "learning_rate", "eps", "clip_norm")
        require_positive(self, "weight_decay", allow_zero=True)
        require_fractions(self, "b1", "b2", below_one=True)

    def build(self, axes: Any, steps: int) -> optax.GradientTransformation:
        adamw = optax.adamw(
            self.schedule.build(self.learning_rate, steps),
            b1=self.b1,
            b2=self.b2,
            eps=self.eps,
            weight_decay=self.weight_decay,
            mask=_mask(axes, self.decayed),
        )
        return _clipped(adamw, self.clip_norm)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Muon:
    """Muon for matrices, AdamW for embeddings and norms (Jordan et al. 2024; arXiv 2502.16982).

    Updates of matrices are scaled to the root mean square of AdamW's (0.2), so one learning rate
    serves both unless `adam_learning_rate` says otherwise.
    """

    learning_rate: float = 1e-3
    adam_learning_rate: float | None = None
    momentum: float = 0.95
    b1: float = 0.9
    b2: float = 0.95
    weight_decay: float = 0.1
    decayed: tuple[Kind, ...] = ("matrix", "embedding")
    clip_norm: float | None = 1.0
    schedule: WarmupStableDecay | Cosine = WarmupStableDecay()

    def __post_init__(self) -> None:
        check_types(self)
        require_positive(self, "learning_rate", "adam_learning_rate", "clip_norm")
        require_positive(self, "weight_decay", allow_zero=True)
        require_fractions(self, "momentum", "b1", "b2", below_one=True)

    def build(self, axes: Any, steps: int) -> optax.GradientTransformation:
        # A transformation a kind: within optax's `muon` the parameters that are no matrices get
        # Nesterov's momentum, and a weight decay that no mask reaches. Left to itself it also takes
        # a 2-D embedding for a matrix, and a 3-D attention matrix for none.
        rate = self.schedule.build(self.adam_learning_rate or self.learning_rate, steps)
        decay: dict[Kind, float] = {
            name: self.weight_decay if name in self.decayed else 0.0 for name in get_args(Kind)
        }
        transforms: dict[Any, optax.GradientTransformation] = {
            "matrix": muon(
                self.schedule.build(self.learning_rate, steps),
                beta=self.momentum,
                weight_decay=decay["matrix"],
                muon_weight_dimension_numbers=_map_axes(matrix_dimensions, axes),
                consistent_rms=0.2,
            )
        }
        for name in ("embedding", "norm"):
            transforms[name] = optax.adamw(rate, b1=self.b1, b2=self.b2, weight_decay=decay[name])
        optimizer = optax.partition(transforms, _map_axes(kind, axes))
        return _clipped(optimizer, self.clip_norm)


type Optimizer = AdamW | Muon


def kind(axes: Axes) -> Kind:
    if "vocab" in axes:
        return "embedding"
    return "matrix" if len([name for name in axes if name != "layers"]) > 1 else "norm"


def matrix_dimensions(axes: Axes) -> MuonDimensionNumbers | None:
    """Which axes a matrix sums over and which it produces, None for what is no matrix.

    Every matrix of the model maps from or to the embedding axis, every factor of a low-rank update
    from or to its rank, which has no name; all other axes but the stacked layers belong to its
    other side (heads x head_dim is one side).
    """
    if kind(axes) != "matrix":
        return None
    side = None if None in axes else "embed"
    own = axes.index(side)
    others = tuple(i for i, name in enumerate(axes) if name not in (side, "layers"))
    if own < min(others):
        return MuonDimensionNumbers((own,), others)
    return MuonDimensionNumbers(others, (own,))


def _map_axes(fn: Any, axes: Any) -> Any:
    return jax.tree.map(fn, axes, is_leaf=lambda x: isinstance(x, tuple))


def _mask(axes: Any, kinds: tuple[Kind, ...]) -> Any:
    return _map_axes(lambda names: kind(names) in kinds, axes)


def _clipped(
    optimizer: optax.GradientTransformation, norm: float | None
) -> optax.GradientTransformation:
    if norm is None:
        return optimizer
    return optax.chain(optax.clip_by_global_norm(norm), optimizer)


def _warmup_steps(fraction: float, steps: int) -> int:
    return max(1, min(round(fraction * steps), steps - 1))
