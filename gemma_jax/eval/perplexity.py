"""Bits per byte, perplexity and accuracy of a model on text.

Bits per byte does not depend on the vocabulary, so models with different tokenizers compare.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np

from gemma_jax.model.transformer import Transformer
from gemma_jax.ops.vocab_loss import vocab_loss
from gemma_jax.progress import progress
from gemma_jax.sharding import Layout


class _Totals(NamedTuple):
    nats: Any  # over all labels
    text_nats: Any  # over labels that stand for bytes: no control tokens
    hits: Any
    tokens: Any
    bytes: Any


def make_evaluation(
    model: Transformer,
    sequences: Iterable[dict[str, np.ndarray]],
    token_bytes: np.ndarray,
    layout: Layout,
    *,
    batch_size: int,
    show_progress: bool = False,
) -> Callable[[Any], dict[str, float]]:
    """`evaluate(params)` over packed sequences (see `gemma_jax.data.packing`), held in memory.

    `token_bytes` [V] is the number of UTF-8 bytes that each id stands for. Returns

    - `bits_per_byte`: -log2 p(text) / bytes, control tokens left out of both;
    - `loss` (nats a label, all labels), `perplexity` = exp(loss), `accuracy`, `tokens`, `bytes`.

    A sequence sees nothing before its start: a document cut into two sequences is scored in two.
    """
    batches = list(_batches(sequences, batch_size))
    changes = (np.diff(batch["segment_ids"], axis=1) != 0 for batch in batches)
    most = 1 + max((int(change.sum(axis=1).max()) for change in changes), default=0)
    model = dataclasses.replace(model, most_documents=most)
    sizes = np.asarray(token_bytes, np.float32)

    @jax.jit
    def totals(params: Any, batch: dict[str, jax.Array], sizes: jax.Array) -> _Totals:
        hidden = model.hidden(params, batch["tokens"], batch["positions"], batch["segment_ids"])
        mask, labels = batch["loss_mask"], batch["labels"]
        _, stats = vocab_loss(
            hidden,
            model.output_embedding(params),
            labels[..., None],
            mask[..., None],
            softcap=model.config.final_softcap,
        )
        label_logit = stats.target_logits[..., 0]
        nats = mask * (stats.lse - label_logit)
        size = mask * sizes[labels]
        hit = (label_logit >= stats.max_logit).astype(mask.dtype)
        text = (size > 0).astype(mask.dtype)
        return _Totals(nats.sum(), (nats * text).sum(), (mask * hit).sum(), mask.sum(), size.sum())

    def evaluate(params: Any) -> dict[str, float]:
        with layout.active():
            parts = []
            label = "evaluation"
            with progress(label, len(batches), quiet=not show_progress) as advance:
                for batch in batches:
                    parts.append(totals(params, layout.place(batch), sizes))
                    advance(1)
            # Sums of a batch are exact enough in float32, sums over batches want float64.
            sums = _Totals(*np.asarray(jax.device_get(parts), np.float64).sum(axis=0).tolist())
        return _scores(sums)

    return evaluate


def _scores(sums: _Totals) -> dict[str, float]:
    loss = sums.nats / max(sums.tokens, 1)
    return {
        "bits_per_byte": sums.text_nats / math.log(2) / max(sums.bytes, 1),
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "accuracy": sums.hits / max(sums.tokens, 1),
        "tokens": int(sums.tokens),
        "bytes": int(sums.bytes),
    }


def _batches(
    sequences: Iterable[dict[str, np.ndarray]], batch_size: int
) -> Iterable[dict[str, np.ndarray]]:
    """Stacks sequences; the last batch is filled up with empty rows."""
    rows: list[dict[str, np.ndarray]] = []
    for sequence in sequences:
        rows.append(sequence)
        if len(rows) == batch_size:
            yield _stack(rows)
            rows = []
    if rows:
        empty = {name: np.zeros_like(x) for name, x in rows[0].items()}
        yield _stack(rows + [empty] * (batch_size - len(rows)))


def _stack(rows: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
