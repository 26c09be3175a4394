"""Steps whose loss or gradient is not finite, or far over what is usual: what becomes of them.

It is decided on the devices, inside of the step, which then leaves the state as it was. The host
learns of it with the numbers that it fetches anyway (`lookout.py`), so no step waits for it.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gemma_jax.errors import require_positive
from gemma_jax.settings import check_types


class Watch(NamedTuple):
    """What a state remembers of its steps."""

    bad: Any  # int32: the last bad step, 0 for none
    count: Any  # int32: how many there were
    in_row: Any  # int32: how many since the last good one
    good: Any  # int32: good steps
    recent: Any  # float32 [window, 2]: loss and gradient norm of the last good steps, or None


@dataclasses.dataclass(frozen=True, kw_only=True)
class _OnBadStep:
    """A step is bad if its loss or gradient norm is not finite, or over `loss_over` or
    `grad_norm_over` times its median in the last `window` good steps, once there are as many."""

    loss_over: float | None = None
    grad_norm_over: float | None = None
    window: int = 64

    def __post_init__(self) -> None:
        check_types(self)
        require_positive(self, "loss_over", "grad_norm_over", "window")

    def begin(self) -> Watch:
        bad, count, in_row, good = (jnp.zeros((), jnp.int32) for _ in range(4))
        bounded = self.loss_over is not None or self.grad_norm_over is not None
        recent = jnp.zeros((self.window, 2), jnp.float32) if bounded else None
        return Watch(bad, count, in_row, good, recent)

    def judge(
        self, watch: Watch, step: jax.Array, loss: jax.Array, grad_norm: jax.Array
    ) -> tuple[jax.Array, Watch]:
        """Whether step number `step` counts, and what is remembered of it."""
        values = jnp.stack([loss, grad_norm]).astype(jnp.float32)
        good, ended = jnp.isfinite(values).all(), self._ended(watch)
        if watch.recent is not None:
            bounds = [jnp.inf if x is None else x for x in (self.loss_over, self.grad_norm_over)]
            usual = jnp.asarray(bounds, jnp.float32) * jnp.median(watch.recent, axis=0)
            good &= (watch.good < self.window) | (values <= usual).all()
        bad, good = ~good & ~ended, good & ~ended
        recent = watch.recent
        if recent is not None:
            place = watch.good % self.window
            recent = recent.at[place].set(jnp.where(good, values, recent[place]))
        return good, Watch(
            bad=jnp.where(bad, step, watch.bad),
            count=watch.count + bad.astype(jnp.int32),
            in_row=jnp.where(good, 0, watch.in_row + bad.astype(jnp.int32)),
            good=watch.good + good.astype(jnp.int32),
            recent=recent,
        )

    def steps_done(self, good: jax.Array) -> jax.Array:
        """How many a step is, by whether it is good."""
        return jnp.ones_like(good, jnp.int32)

    def go_on(self, watch: Watch) -> Watch:
        """What a run that is started again remembers."""
        return watch

    def _ended(self, watch: Watch) -> jax.Array:
        return jnp.zeros((), jnp.bool_)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stop(_OnBadStep):
    """The run stops at the first bad step, and the state before it is saved."""

    def steps_done(self, good: jax.Array) -> jax.Array:
        return good.astype(jnp.int32)

    def go_on(self, watch: Watch) -> Watch:
        return watch._replace(in_row=jnp.zeros_like(watch.in_row))

    def _ended(self, watch: Watch) -> jax.Array:
        return watch.in_row > 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Skip(_OnBadStep):
    """A bad step changes nothing but the number of steps; `most` in a row are let pass, more stop
    the run. The checkpoint before one is kept, so that it can be run again."""

    most: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "most")


def watch_to_json(watch: Watch) -> dict[str, Any]:
    """As a checkpoint keeps it."""
    values = jax.device_get(watch)._asdict()
    return {name: None if x is None else x.tolist() for name, x in values.items()}


def watch_from_json(saved: dict[str, Any], like: Watch) -> Watch:
    """Laid out as `like`; the median begins anew where its settings have changed."""
    same = like.recent is None or np.shape(saved.get("recent", ())) == like.recent.shape
    values = {}
    for name, x in like._asdict().items():
        if x is None:
            continue
        kept = saved.get(name, 0) if same or name not in ("good", "recent") else 0
        whole = np.broadcast_to(np.asarray(kept, x.dtype), x.shape)
        values[name] = jax.make_array_from_callback(x.shape, x.sharding, whole.__getitem__)
    return Watch(**{"recent": None, **values})
