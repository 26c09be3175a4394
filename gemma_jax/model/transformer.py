"""The Gemma 3 text decoder (arXiv 2503.19786): tokens in, hidden states out.

The layer pattern is the architecture: one scan runs over the whole periods of `attn_pattern`
(each holds one block a letter), and the layers that are left follow unrolled. Logits are not made
here: training never holds them whole (`gemma_jax.ops.vocab_loss`), generation needs them for one
position alone (`Transformer.logits`).
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gemma_jax.model.attention import Attention, Place
from gemma_jax.model.cache import Cache, LayerCache
from gemma_jax.model.config import ModelConfig
from gemma_jax.model.layers import MLP, RMSNorm
from gemma_jax.model.matrix import Matrix, as_array, lookup, scores
from gemma_jax.ops.hardware import on_gpu
from gemma_jax.sharding import pin, split_batch

type Params = Any

_MAX_UNROLLED = 32  # layers; compile time grows with them

REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Block(nn.Module):
    """x += post_norm(attention(pre_norm(x))), then the same with the MLP."""

    config: ModelConfig
    letter: str
    fresh: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], place: Place, cache: LayerCache | None
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        c = self.config
        norm = functools.partial(RMSNorm, c.norm_eps, "embed")
        y = norm(name="pre_attention_norm")(x)
        y, cache = Attention(c, self.letter, self.fresh, name="attention")(y, place, cache)
        x += norm(name="post_attention_norm")(y) if c.post_norms else y
        y = MLP(c, name="mlp")(norm(name="pre_mlp_norm")(x))
        x += norm(name="post_mlp_norm")(y) if c.post_norms else y
        return split_batch(x), cache


class Period(nn.Module):
    """One block for each letter of the pattern."""

    config: ModelConfig
    fresh: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], place: Place, caches: tuple[LayerCache, ...] | None
    ) -> tuple[Float[Array, "B T D"], tuple[LayerCache | None, ...]]:
        block: Any = _block(self.config, inside_scan=not _unrolls(self.config))
        if caches is not None:  # decoding unrolls all layers into one period: trace one a letter
            block = nn.jit(block)
        after = []
        for i, letter in enumerate(self.config.attn_pattern):
            cache = caches[i] if caches is not None else None
            x, cache = block(self.config, letter, self.fresh, name=f"block_{i}")(x, place, cache)
            after.append(cache)
        return x, tuple(after)


def _unrolls(config: ModelConfig) -> bool:
    """Whether the scan's periods are written out in the program, which then takes longer to
    compile. A scan copies all that the backward pass will read into stacks and out of them; where
    nothing is recomputed, that is a good part of a GPU's work (docs/performance.md)."""
    if config.unroll is not None:
        return config.unroll
    return config.remat == "none" and config.num_layers <= _MAX_UNROLLED and on_gpu()


def _block(config: ModelConfig, *, inside_scan: bool) -> type[Block]:
    if config.remat == "none":
        return Block
    policy = REMAT_POLICIES[config.remat]
    return nn.remat(Block, policy=policy, prevent_cse=not inside_scan)


class Embedding(nn.Module):
    """A [V, D] table, used to look tokens up, to score them, or both."""

    config: ModelConfig

    @nn.compact
    def __call__(self) -> Any:
        c = self.config
        own: Any = self.get_variable("params", "embedding")
        if isinstance(own, Matrix):
            return own
        # With the lookup's factor sqrt(D), tokens enter the first block with variance 1.
        init: Any = nn.initializers.normal(stddev=c.embed_dim**-0.5)
        init = nn.with_logical_partitioning(init, ("vocab", "embed"))
        return self.param("embedding", init, (c.vocab_size, c.embed_dim), jnp.float32)


class Decoder(nn.Module):
    """The Linen module behind `Transformer`."""

    config: ModelConfig
    fresh: bool = False  # the cache is empty

    @nn.compact
    def __call__(
        self, tokens: Int[Array, "B T"], place: Place, cache: Cache | None
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        c = self.config
        dtype = jnp.dtype(c.compute_dtype)
        table = Embedding(c, name="embedder")()
        if not c.tied_embedding:
            Embedding(c, name="head")()
        # Google's weights were trained with sqrt(D) rounded to the compute dtype.
        with jax.named_scope("lookup"):
            x = lookup(table, tokens, dtype) * jnp.asarray(c.embed_dim**0.5, dtype)
        x = split_batch(x)

        periods: Any = ()
        if c.num_periods:
            scan = nn.scan(
                Period,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(nn.broadcast, 0),
                length=c.num_periods,
                unroll=c.num_periods if _unrolls(c) else 1,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            caches = cache.periods if cache else None
            x, periods = scan(c, self.fresh, name="periods")(x, place, caches)
        remainder: list[Any] = []
        for i, letter in enumerate(c.remainder):
            layer = cache.remainder[i] if cache else None
            block = _block(c, inside_scan=False)(c, letter, self.fresh, name=f"remainder_{i}")
            x, layer = block(x, place, layer)
            remainder.append(layer)
        x = RMSNorm(c.norm_eps, "embed", name="final_norm")(x)
        return x, Cache(periods, tuple(remainder)) if cache else None


@dataclasses.dataclass(frozen=True)
class Transformer:
    """The model as functions of a parameter tree that the caller owns.

    `most_documents` is what the caller knows of the sequences of `hidden` (`MaskSpec`): some
    kernels are faster for it, and programs smaller.
    """

    config: ModelConfig
    most_documents: int | None = None

    def init(self, rng: Array) -> Params:
        """Fresh float32 parameters."""
        return nn.unbox(_init(self.config, rng))

    def axes(self) -> Params:
        """The logical axes of each parameter, a tree of tuples of names; allocates nothing."""
        is_box = lambda x: isinstance(x, nn.LogicallyPartitioned)  # noqa: E731
        return jax.tree.map(lambda box: box.names, _boxed_shapes(self.config), is_leaf=is_box)

    def shapes(self) -> Params:
        """The parameter tree as shapes; allocates nothing."""
        return nn.unbox(_boxed_shapes(self.config))

    def hidden(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Final-normed hidden states. Tokens of different segments never see each other."""
        place = Place(_positions(tokens, positions), segment_ids, self.most_documents)
        hidden, _ = Decoder(self.config).apply({"params": params}, tokens, place, None)
        return hidden

    def layers(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
    ) -> Iterator[tuple[str, Float[Array, "B T D"]]]:
        """What `hidden` computes on its way, by name: to look for where something goes wrong."""
        model, params = unrolled(self, params)
        c, place = model.config, Place(positions, segment_ids)
        dtype = jnp.dtype(c.compute_dtype)
        x = lookup(params["embedder"]["embedding"], tokens, dtype)
        x = x * jnp.asarray(c.embed_dim**0.5, dtype)
        yield "embedding", x
        for i, letter in enumerate(c.attn_pattern):
            own = jax.tree.map(lambda leaf: leaf[0], params["periods"][f"block_{i}"])
            x, _ = Block(c, letter).apply({"params": own}, x, place, None)
            yield f"layer {i} ({letter})", x
        norm: Any = RMSNorm(c.norm_eps, "embed").apply({"params": params["final_norm"]}, x)
        yield "final norm", norm

    def extend(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None,
        cache: Cache,
        *,
        fresh: bool = False,
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Hidden states of tokens that follow what the cache holds, and the cache after them.

        Prefill and decoding alike. Positions are absolute and below the cache's length; tokens
        with segment id 0 are padding, neither seen nor stored. `fresh` says that the cache is
        empty, the positions are 0, 1, ... and padding comes last: the same result, at the cost of
        `hidden`.
        """
        place = Place(positions, segment_ids, most_documents=2 if fresh else None)
        outcome: Any = Decoder(self.config, fresh).apply({"params": params}, tokens, place, cache)
        return outcome

    def output_embedding(self, params: Params) -> Float[Array, "V D"]:
        return as_array(self._output_table(params))

    def _output_table(self, params: Params) -> Any:
        return params["embedder" if self.config.tied_embedding else "head"]["embedding"]

    def logits(self, params: Params, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """float32 scores of every token, final softcap applied. For few positions: see ops.

        Among devices each gets all scores of its rows.
        """
        z = pin(scores(hidden, self._output_table(params)), "batch")
        cap = self.config.final_softcap
        return z if cap is None else cap * jnp.tanh(z / cap)


def _init(config: ModelConfig, rng: Array) -> Params:
    tokens = jnp.zeros((1, 1), jnp.int32)
    return Decoder(config).init(rng, tokens, Place(tokens, None), None)["params"]


@functools.lru_cache(maxsize=32)
def _boxed_shapes(config: ModelConfig) -> Params:
    """Shapes and logical axes of the parameters. Kept: many ask, and the whole model is traced."""
    return jax.eval_shape(functools.partial(_init, config), jax.random.key(0))


def unrolled(model: Transformer, params: Params) -> tuple[Transformer, Params]:
    """The same model as one period that holds every layer.

    For decoding: a scan copies each period's matrices out of the stack at every step, which takes
    longer than to multiply one token by them.
    """
    config = model.config
    length = len(config.attn_pattern)
    layers = {
        f"block_{period * length + i}": jax.tree.map(
            lambda x, period=period: x[period : period + 1], params["periods"][f"block_{i}"]
        )
        for period in range(config.num_periods)
        for i in range(length)
    }
    for i in range(len(config.remainder)):
        rest = jax.tree.map(lambda x: x[None], params[f"remainder_{i}"])
        layers[f"block_{config.num_periods * length + i}"] = rest
    kept = {name: value for name, value in params.items() if name in ("embedder", "head")}
    params = {**kept, "final_norm": params["final_norm"], "periods": layers}
    return Transformer(unrolled_config(config)), params


def unrolled_config(config: ModelConfig) -> ModelConfig:
    return dataclasses.replace(config, attn_pattern=config.layer_letters)


def _positions(tokens: Array, positions: Array | None) -> Array:
    if positions is not None:
        return positions
    return jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
