"""From logits to the next token."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gemma_jax.errors import require_fractions, require_positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is drawn; what is given applies in this order.

    `repetition_penalty` above 1 makes tokens that came before less likely (CTRL, arXiv 1909.05858:
    positive logits are divided by it, negative ones multiplied). `temperature` 0 is greedy. `top_k`
    keeps the k likeliest tokens, `top_p` the smallest set of likeliest ones that holds this much
    probability (arXiv 1904.09751), `min_p` those at least this share as likely as the likeliest
    (arXiv 2407.01082).
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    def __post_init__(self) -> None:
        require_positive(self, "temperature", allow_zero=True)
        require_positive(self, "top_k", "top_p", "min_p", "repetition_penalty")
        require_fractions(self, "top_p", "min_p")


def penalise(
    logits: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty: float
) -> Float[Array, "B V"]:
    """Logits with the repetition penalty on the tokens that were `seen`."""
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def sample(logits: Float[Array, "B V"], keys: Array, sampling: Sampling) -> Int[Array, " B"]:
    """One token a row; `keys` [B] are random keys, so a row does not depend on its batch."""
    if sampling.temperature == 0:
        return logits.argmax(axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        kept, _ = jax.lax.top_k(logits, sampling.top_k)
        logits = jnp.where(logits < kept[:, -1:], -jnp.inf, logits)
    if sampling.top_p is not None and sampling.top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        least = jnp.where(before < sampling.top_p, ordered, jnp.inf).min(axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if sampling.min_p is not None:
        least = logits.max(axis=-1, keepdims=True) + jnp.log(jnp.float32(sampling.min_p))
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
