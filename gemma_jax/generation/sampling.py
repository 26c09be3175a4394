"""From logits to the next token."""

import dataclasses
import math

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
    return _draw(logits, jax.vmap(jax.random.uniform)(keys))


def _draw(logits: Float[Array, "B V"], u: Float[Array, " B"]) -> Int[Array, " B"]:
    """The token in whose share of the probability `u` of [0, 1) falls.

    First among blocks of tokens, then within the block: a random number a row in place of one a
    token, and no sum over all of V one by one.
    """
    blocks = math.ceil(math.sqrt(logits.shape[-1]))
    weights = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
    weights = jnp.pad(weights, ((0, 0), (0, -weights.shape[-1] % blocks)))
    weights = weights.reshape(len(u), blocks, -1)
    shares = weights.sum(axis=-1)
    block, left = _place(shares, u * shares.sum(axis=-1))
    inside = jnp.take_along_axis(weights, block[:, None, None], axis=1)[:, 0]
    token, _ = _place(inside, left)
    return block * inside.shape[-1] + token


def _place(weights: Float[Array, "B n"], at: Float[Array, " B"]) -> tuple[Array, Array]:
    """The index [B] where the running sum of the weights passes `at`, and what is left of `at`
    there; rounding never leads to an index without weight."""
    after = jnp.cumsum(weights, axis=-1)
    there = weights > 0
    passed = there & (after > at[:, None])
    last = weights.shape[-1] - 1 - there[:, ::-1].argmax(axis=-1)
    index = jnp.where(passed.any(axis=-1), passed.argmax(axis=-1), last).astype(jnp.int32)
    before = jnp.take_along_axis(after - weights, index[:, None], axis=-1)[:, 0]
    return index, at - before
