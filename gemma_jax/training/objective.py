"""What an objective is, and the plainest one.

An objective is a function `(params, batch, rng) -> (loss, sums)`: `loss` is a sum over tokens,
`sums["loss"]` is the pair of that sum and the weight to divide it by, and every other entry of
`sums` is a metric in the same form. Sums, not means, so that k microbatches are exactly one batch.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from gemma_jax.errors import require_positive
from gemma_jax.ops.vocab_loss import HeadBackend, LogitsDtype, vocab_loss
from gemma_jax.settings import check_types

type Batch = Mapping[str, jax.Array]
type Sums = dict[str, tuple[jax.Array, jax.Array]]  # (total, weight)
type Objective = Callable[[Any, Batch, jax.Array], tuple[jax.Array, Sums]]


class LanguageModel(Protocol):
    """What an objective needs of a model."""

    def hidden(
        self, params: Any, tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array
    ) -> jax.Array: ...

    def output_embedding(self, params: Any) -> jax.Array: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Xent:
    """Next-token cross-entropy, with z-loss where wanted (PaLM uses 1e-4)."""

    z_loss: float = 0.0

    def __post_init__(self) -> None:
        check_types(self)
        require_positive(self, "z_loss", allow_zero=True)

    def build(
        self,
        model: LanguageModel,
        *,
        softcap: float | None = None,
        backend: HeadBackend = "auto",
        logits_dtype: LogitsDtype = "compute",
    ) -> Objective:
        """`softcap` is the model's final softcap, the others are about its head (`vocab_loss`)."""

        def objective(params: Any, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Sums]:
            mask = batch["loss_mask"]
            hidden = model.hidden(params, batch["tokens"], batch["positions"], batch["segment_ids"])
            loss, stats = vocab_loss(
                hidden,
                model.output_embedding(params),
                batch["labels"][..., None],
                mask[..., None],
                z_loss=self.z_loss,
                softcap=softcap,
                backend=backend,
                logits_dtype=logits_dtype,
            )
            label_logit = stats.target_logits[..., 0]
            count = mask.sum()
            hit = label_logit >= stats.max_logit
            return loss, {
                "loss": (loss, count),
                "cross_entropy": ((mask * (stats.lse - label_logit)).sum(), count),
                "accuracy": ((mask * hit.astype(jnp.float32)).sum(), count),
            }

        return objective
