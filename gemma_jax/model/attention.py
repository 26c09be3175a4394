"""One attention layer: projections, QK-norm, RoPE, and where its keys come from."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gemma_jax.model.cache import EMPTY, LayerCache, cache_axes, write
from gemma_jax.model.config import ModelConfig
from gemma_jax.model.layers import RMSNorm, kernel, rope
from gemma_jax.model.matrix import multiply
from gemma_jax.ops.attention import attention
from gemma_jax.ops.masks import MaskSpec
from gemma_jax.sharding import current_layout, pin, split_batch


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Place:
    """Where the tokens of a batch stand.

    `positions` drive RoPE (and the mask, when there is a cache). `segment_ids` keep packed
    documents apart; with a cache, 0 marks padding, which is never written to it. `most_documents`
    is that of `MaskSpec`.
    """

    positions: Int[Array, "B T"]
    segment_ids: Int[Array, "B T"] | None
    most_documents: int | None = dataclasses.field(default=None, metadata={"static": True})


class Attention(nn.Module):
    """Grouped-query attention of a layer whose letter is `letter`.

    With `fresh` the cache is empty, so new tokens see each other alone.
    """

    config: ModelConfig
    letter: str
    fresh: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], place: Place, cache: LayerCache | None
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        c = self.config
        D, N, K, H = c.embed_dim, c.num_heads, c.num_kv_heads, c.head_dim
        w_q = kernel(self, "query", (D, N, H), ("embed", "heads", "head_dim"), D)
        w_k = kernel(self, "key", (D, K, H), ("embed", "kv_heads", "head_dim"), D)
        w_v = kernel(self, "value", (D, K, H), ("embed", "kv_heads", "head_dim"), D)
        w_o = kernel(self, "output", (N, H, D), ("heads", "head_dim", "embed"), N * H)

        q = multiply(x, w_q)
        k = multiply(x, w_k)
        v = multiply(x, w_v)
        if c.qk_norm:
            q = RMSNorm(c.norm_eps, "head_dim", name="query_norm")(q)
            k = RMSNorm(c.norm_eps, "head_dim", name="key_norm")(k)
        base, scale = c.rope(self.letter)
        q = rope(q, place.positions, base=base, scale=scale) * jnp.asarray(c.q_scale, q.dtype)
        k = rope(k, place.positions, base=base, scale=scale)

        # A backend for whole sequences says nothing of those that go on from a cache.
        window, backend = c.window(self.letter), c.attn_backend
        if cache is None or self.fresh:
            spec = MaskSpec(
                window=window,
                most_documents=place.most_documents,
                q_segment_ids=place.segment_ids,
                k_segment_ids=place.segment_ids,
            )
            if cache is not None:
                cache = write(cache, k, v, place.positions, _valid(place))
        else:
            k, v, spec, cache = _extend(cache, k, v, place, window)
            q, backend = _meets(q, k), "auto"
        out = attention(q, k, v, spec, softcap=c.attn_softcap, backend=backend)
        return multiply(out, w_o, inputs=2), cache


def _valid(place: Place) -> Bool[Array, "B T"]:
    if place.segment_ids is None:
        return jnp.ones(place.positions.shape, bool)
    return place.segment_ids > 0


def _extend(
    cache: LayerCache, k: Array, v: Array, place: Place, window: int | None
) -> tuple[Array, Array, MaskSpec, LayerCache]:
    """The keys that new tokens see (cached ones and themselves) and the cache after them."""
    positions = place.positions
    valid = _valid(place)
    after = write(cache, k, v, positions, valid)
    if k.shape[1] == 1:
        # The slot that one new token takes over held a key that had just left its window.
        keys, values, key_positions = after.k, after.v, after.positions
        key_valid = key_positions != EMPTY
    else:
        keys = jnp.concatenate([cache.k, k], axis=1)
        values = jnp.concatenate([cache.v, v], axis=1)
        key_positions = jnp.concatenate([cache.positions, positions], axis=1)
        key_valid = jnp.concatenate([cache.positions != EMPTY, valid], axis=1)
        # Split slots are put together once for the tokens of a whole chunk.
        keys, values = (pin(x, "batch", None, "kv_heads") for x in (keys, values))
    spec = MaskSpec(
        window=window,
        q_positions=positions,
        k_positions=key_positions,
        q_segment_ids=valid.astype(jnp.int32),
        k_segment_ids=key_valid.astype(jnp.int32),
    )
    return keys, values, spec, after


def _meets(q: Float[Array, "B T N H"], k: Float[Array, "B S K H"]) -> Float[Array, "B T N H"]:
    """A new token's query with all its heads on each device, where the cached keys' slots are
    split instead of the heads."""
    layout = current_layout()
    if layout is None or q.shape[1] > 1:
        return q
    slots = layout.spec(cache_axes(layout, k.shape), k.shape)[1]
    return q if slots is None else split_batch(q)
