"""Supervised tuning: cross-entropy on the model's turns, and how its replies are judged."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from gemma_jax.errors import require_positive
from gemma_jax.ops.vocab_loss import HeadBackend, LogitsDtype
from gemma_jax.settings import check_types
from gemma_jax.training.objective import LanguageModel, Objective, Xent

type Score = float | tuple[float, float]
type Scorer = Callable[[Mapping[str, Any], str], Score | Mapping[str, Score]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sft:
    """Cross-entropy over the labels that are the model's to say; needs `data=Conversations(...)`.

    Each validation also has the model answer `replies` held-out conversations greedily, up to
    `max_new_tokens`: the share of replies that equal the last turn of the model is `exact_match`.
    `scorer(conversation, reply)` is called with a line of the file and the reply to it; a number
    becomes the metric `score`, a dict of numbers a metric each, as means over the replies. In the
    place of a number a pair (total, weight) may stand, as F1 needs it (`eval.replies`).
    """

    z_loss: float = 0.0
    replies: int = 64
    max_new_tokens: int = 128
    scorer: Callable | None = None

    def __post_init__(self) -> None:
        check_types(self)
        require_positive(self, "z_loss", "replies", allow_zero=True)
        require_positive(self, "max_new_tokens")

    def build(
        self,
        model: LanguageModel,
        *,
        softcap: float | None = None,
        backend: HeadBackend = "auto",
        logits_dtype: LogitsDtype = "compute",
    ) -> Objective:
        """As that of `Xent`."""
        return Xent(z_loss=self.z_loss).build(
            model, softcap=softcap, backend=backend, logits_dtype=logits_dtype
        )
