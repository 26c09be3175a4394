"""Distillation from sampled targets (Gemma 3 report, section 2.2; arXiv 2503.16870)."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gemma_jax.distill.teacher import TeacherJob
from gemma_jax.errors import require_fractions, require_positive
from gemma_jax.ops.vocab_loss import HeadBackend, LogitsDtype, vocab_loss
from gemma_jax.settings import check_types


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distill:
    """Cross-entropy against the teacher's sampled distribution, mixed with hard cross-entropy.

    loss = (1 - hard_weight) * CE(sampled targets) + hard_weight * CE(label). `shards` is a folder
    of teacher shards, or the job that writes it.
    """

    shards: str | TeacherJob
    hard_weight: float = 0.0
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        check_types(self)
        require_fractions(self, "hard_weight")
        require_positive(self, "z_loss", allow_zero=True)

    def build(
        self,
        model: Any,
        *,
        softcap: float | None = None,
        backend: HeadBackend = "auto",
        logits_dtype: LogitsDtype = "compute",
    ) -> Callable:
        """The objective; besides the loss it reports

        - `cross_entropy`, `accuracy`: of the labels, comparable with a run without a teacher;
        - `teacher_cross_entropy`: the teacher's, on the same labels;
        - `kl`: KL(teacher || student), estimated without bias as the cross-entropy against the
          sampled targets less the teacher's entropy;
        - `agreement`: how often the teacher's most drawn token is the student's likeliest.
        """

        def objective(params: Any, batch: Any, rng: jax.Array) -> tuple[jax.Array, dict]:
            mask = batch["loss_mask"]
            soft = batch["target_weights"] * mask[..., None]
            # The label goes first, so that its statistics come at no cost when its weight is 0.
            ids = jnp.concatenate([batch["labels"][..., None], batch["target_ids"]], axis=-1)
            hard = self.hard_weight * mask[..., None]
            weights = jnp.concatenate([hard, (1 - self.hard_weight) * soft], axis=-1)
            hidden = model.hidden(params, batch["tokens"], batch["positions"], batch["segment_ids"])
            loss, stats = vocab_loss(
                hidden,
                model.output_embedding(params),
                ids,
                weights,
                z_loss=self.z_loss,
                softcap=softcap,
                backend=backend,
                logits_dtype=logits_dtype,
            )
            label_logit, target_logits = stats.target_logits[..., 0], stats.target_logits[..., 1:]
            soft_ce = soft.sum(-1) * stats.lse - (soft * target_logits).sum(-1)
            favourite = soft.argmax(axis=-1, keepdims=True)
            favourite_logit = jnp.take_along_axis(target_logits, favourite, axis=-1)[..., 0]

            count = mask.sum()
            totals = {
                "loss": loss,
                "cross_entropy": (mask * (stats.lse - label_logit)).sum(),
                "accuracy": (mask * (label_logit >= stats.max_logit).astype(mask.dtype)).sum(),
                "teacher_cross_entropy": -(mask * batch["teacher_label_logprob"]).sum(),
                "kl": (soft_ce - mask * batch["teacher_entropy"]).sum(),
                "agreement": (mask * (favourite_logit >= stats.max_logit).astype(mask.dtype)).sum(),
            }
            return loss, {name: (total, count) for name, total in totals.items()}

        return objective
