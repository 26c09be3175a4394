"""Which key a query may see, said once for every attention backend."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskSpec:
    """A causal mask, with a sliding window and segments where they are given.

    Query t sees key s when `s <= t`, when `t - s < window` (the window counts the token itself),
    and when both carry the same segment id. t and s are indices into the sequence, or the entries
    of `q_positions` and `k_positions` where keys do not lie in order (a ring-buffer cache).

    `most_documents` promises that no sequence has more runs of equal segment ids, padding counted,
    and that none comes back; None: nobody knows.
    """

    window: int | None = dataclasses.field(default=None, metadata={"static": True})
    most_documents: int | None = dataclasses.field(default=None, metadata={"static": True})
    q_positions: Int[Array, "#B T"] | None = None
    k_positions: Int[Array, "#B S"] | None = None
    q_segment_ids: Int[Array, "B T"] | None = None
    k_segment_ids: Int[Array, "B S"] | None = None


def visible(
    spec: MaskSpec, q_positions: Int[Array, "..."], k_positions: Int[Array, "..."]
) -> Bool[Array, "..."]:
    """Causality and window alone, for positions that broadcast against each other."""
    distance = q_positions - k_positions
    seen = distance >= 0
    if spec.window is not None:
        seen &= distance < spec.window
    return seen


def dense_mask(spec: MaskSpec, num_queries: int, num_keys: int) -> Bool[Array, "b T S"]:
    """The whole mask, [B, T, S], or [1, T, S] where nothing in it depends on the sequence."""
    q_positions, k_positions = spec.q_positions, spec.k_positions
    if q_positions is None:
        q_positions = jnp.arange(num_queries, dtype=jnp.int32)[None]
    if k_positions is None:
        k_positions = jnp.arange(num_keys, dtype=jnp.int32)[None]
    mask = visible(spec, q_positions[:, :, None], k_positions[:, None, :])
    if spec.q_segment_ids is not None and spec.k_segment_ids is not None:
        mask &= spec.q_segment_ids[:, :, None] == spec.k_segment_ids[:, None, :]
    return mask
