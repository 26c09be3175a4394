"""RMSNorm, rotary positions and the gated MLP of Gemma 3 (arXiv 2503.19786, section 2)."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gemma_jax.model.config import ModelConfig
from gemma_jax.model.matrix import Matrix, multiply
from gemma_jax.sharding import gather_parameter


def kernel(module: nn.Module, name: str, shape: tuple[int, ...], axes: tuple, fan_in: int) -> Any:
    """A float32 matrix parameter, truncated normal with variance 1 / fan_in, in compute dtype.

    `axes` are its logical axes: the rules lay it out by them, and gather what is split for storage.
    An array, or the `Matrix` that the parameters hold in its place.
    """
    config: ModelConfig = module.config
    own: Any = module.get_variable("params", name)
    if isinstance(own, Matrix):
        return own.astype(config.compute_dtype)
    init = nn.initializers.truncated_normal(stddev=fan_in**-0.5)
    value: Any = module.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32)
    return gather_parameter(value.astype(config.compute_dtype), axes)


class RMSNorm(nn.Module):
    """x / rms(x) * (1 + w) over the last dimension, in float32; w starts at 0 (arXiv 1910.07467).

    `axis` is the logical axis of w.
    """

    eps: float
    axis: str | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "*b D"]) -> Float[Array, "*b D"]:
        init = nn.with_logical_partitioning(nn.initializers.zeros, (self.axis,))
        weight: Any = self.param("scale", init, (x.shape[-1],), jnp.float32)
        return _rms_norm(x, gather_parameter(weight, (self.axis,)), self.eps)


# Norms, rotations and gates are cheap to compute and, in float32, dear to keep: with
# `jax.checkpoint` the backward pass gets them from their inputs again.


@functools.partial(jax.checkpoint, static_argnums=2)
def _rms_norm(x: Float[Array, "*b D"], weight: Float[Array, " D"], eps: float) -> Array:
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    return (y * (1 + weight)).astype(x.dtype)


def rope(
    x: Float[Array, "B T N H"], positions: Int[Array, "B T"], *, base: float, scale: float
) -> Float[Array, "B T N H"]:
    """Rotates (x_i, x_{i + H/2}) by position / scale * base^(-2i / H) (arXiv 2104.09864).

    Gemma's half-split form; angles and rotation in float32.
    """
    return _rotate(x, positions, base, scale)


@functools.partial(jax.checkpoint, static_argnums=(2, 3))
def _rotate(x: Array, positions: Array, base: float, scale: float) -> Array:
    half = x.shape[-1] // 2
    exponents = jnp.arange(half, dtype=jnp.float32) / half
    frequencies = base**-exponents / scale
    angles = positions.astype(jnp.float32)[..., None, None] * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


class MLP(nn.Module):
    """GeGLU: (gelu_tanh(x W_gate) * x W_up) W_down (arXiv 2002.05202), no biases."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        D, F = self.config.embed_dim, self.config.mlp_dim
        gate = multiply(x, kernel(self, "gate", (D, F), ("embed", "mlp"), D))
        up = multiply(x, kernel(self, "up", (D, F), ("embed", "mlp"), D))
        hidden = _geglu(gate, up)
        return multiply(hidden, kernel(self, "down", (F, D), ("mlp", "embed"), F))


@jax.checkpoint
def _geglu(gate: Array, up: Array) -> Array:
    return nn.gelu(gate, approximate=True) * up
