"""Drawing sparse targets from a teacher's distribution: N ids a token, with replacement.

A token's target is `count / N` over the drawn ids. Its expectation is the teacher's distribution,
so the gradient of the cross-entropy against it is an unbiased estimate of full distillation
(random-sampling KD, arXiv 2503.16870). Two ways to draw, with the same storage:

  systematic   `c_i = floor(N F_i + u) - floor(N F_{i-1} + u)`, F the cumulative distribution and
               one u ~ U[0, 1) a token: every id gets floor or ceil of N p_i, up to one on each
               side. The squared error of the estimate is several times below multinomial's.
  multinomial  N independent draws.

Both are N sorted thresholds in [0, 1) sent through the inverse of F (`mass_tree.py`): (k + u) / N
with the code's u = 1 - u above, and N sorted uniforms.

The draws of a token depend on its key and its logits alone, not on the batch around it, nor on how
the vocabulary is split over devices.
"""

from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from gemma_jax.distill.mass_tree import VocabSplit, find, mass_tree
from gemma_jax.ops.table import own_ids

Method = Literal["systematic", "multinomial"]
METHODS: tuple[str, ...] = get_args(Method)


class SampledTargets(NamedTuple):
    """Sparse targets of n tokens, and what stays measurable about the teacher.

    `ids` int32 [n, N], ascending; `counts` int32 [n, N], adding up to N in each row: an id has its
    count at its first place in the row and 0 at the others. `label_logprob`, `entropy` float32 [n]
    in nats.
    """

    ids: jax.Array
    counts: jax.Array
    label_logprob: jax.Array
    entropy: jax.Array


def token_keys(base: jax.Array, record_index: jax.Array, num_positions: int) -> jax.Array:
    """Keys [B, T], one a token: a function of the seed, the record and the place alone.

    `base` is `jax.random.key(seed)`; `record_index` int [B].
    """
    places = jnp.arange(num_positions)
    fold = jax.random.fold_in
    return jax.vmap(lambda r: jax.vmap(lambda t: fold(fold(base, r), t))(places))(record_index)


def sample_targets(
    logits: jax.Array,
    labels: jax.Array,
    keys: jax.Array,
    *,
    draws: int,
    method: Method,
    split: VocabSplit | None = None,
) -> SampledTargets:
    """Draws `draws` ids a token from softmax(logits), with replacement.

    `logits` float32 [n, V] (-inf is allowed: such an id is never drawn), `labels` int [n], `keys`
    [n] as of `token_keys`. With `split`, `logits` are this device's columns of them. Holds a few
    arrays of that size: the caller bounds n. NaN logits give NaN statistics and meaningless draws.
    """
    logits = logits.astype(jnp.float32)
    label = _label_logit(logits, labels, split)
    tree = mass_tree(logits, label, split)
    log_total = jnp.log(tree.total)
    thresholds = jax.vmap(lambda key: _thresholds(key, draws, method))(keys)
    ids = jnp.sort(find(tree, thresholds, split), axis=-1)
    return SampledTargets(
        ids=ids,
        counts=_run_lengths(ids),
        label_logprob=label - tree.shift - log_total,
        entropy=log_total - tree.drift / tree.total,
    )


def _label_logit(logits: jax.Array, labels: jax.Array, split: VocabSplit | None) -> jax.Array:
    axis = None if split is None else split.axis
    places, here = own_ids(labels[:, None], logits.shape[1], axis)
    logit = jnp.take_along_axis(logits, places, axis=-1, mode="clip")
    if axis is not None:
        logit = jax.lax.psum(jnp.where(here, logit, 0.0), axis)
    return logit[:, 0]


def _thresholds(key: jax.Array, draws: int, method: Method) -> jax.Array:
    """N places in [0, 1) at which the inverse cumulative distribution is read, ascending.

    Uniforms are multiples of 2^-23: an id of less than 1e-7 probability comes in steps of that.
    """
    if method == "multinomial":
        return jnp.sort(jax.random.uniform(key, (draws,)))
    u = jax.random.uniform(key, ())
    return (jnp.arange(draws, dtype=jnp.float32) + u) / draws


def _run_lengths(ids: jax.Array) -> jax.Array:
    """Counts [n, N] of equal neighbours in sorted `ids`, at each run's first place, else 0."""
    draws = ids.shape[-1]
    places = jnp.broadcast_to(jnp.arange(draws), ids.shape)
    is_start = jnp.concatenate(
        [jnp.ones_like(ids[:, :1], bool), ids[:, 1:] != ids[:, :-1]], axis=-1
    )
    starts = jnp.where(is_start, places, draws)
    next_start = jax.lax.cummin(starts, axis=1, reverse=True)
    next_start = jnp.concatenate(
        [next_start[:, 1:], jnp.full_like(next_start[:, :1], draws)], axis=-1
    )
    return jnp.where(is_start, next_start - places, 0).astype(jnp.int32)
