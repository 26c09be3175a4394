"""One optimizer step, whatever the objective."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from gemma_jax.sharding import Layout
from gemma_jax.training.bad_steps import Skip, Stop, Watch
from gemma_jax.training.objective import Batch, Objective, Sums

type Metrics = dict[str, jax.Array]
type Step = Callable[["TrainState", Batch, Any], tuple["TrainState", Metrics]]
# (what is trained, what is not, a key for dropout or None) -> the parameters of the model
type Join = Callable[[Any, Any, jax.Array | None], Any]


class TrainState(NamedTuple):
    step: jax.Array  # int32: optimizer steps done
    params: Any
    opt_state: Any
    ema: Any  # average of the parameters, or None
    watch: Watch | None = None  # of bad steps; None: there is nobody who watches


def init_state(
    params: Any,
    optimizer: optax.GradientTransformation,
    *,
    ema: bool,
    on_bad_step: Stop | Skip | None = None,
) -> TrainState:
    average = jax.tree.map(jnp.copy, params) if ema else None
    watch = None if on_bad_step is None else on_bad_step.begin()
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), average, watch)


def state_shardings(layout: Layout, axes: Any, state: TrainState) -> Any:
    """Where each part of a state lives: moments and average as their parameter."""
    params = layout.shardings(axes, state.params)
    leaves, _ = jax.tree_util.tree_flatten_with_path(state.params)
    paths = {path: leaf.shape for path, leaf in leaves}
    shardings = dict(zip(paths, jax.tree.leaves(params), strict=True))
    whole: Any = layout.replicated()

    def follow(path: tuple, leaf: jax.Array) -> NamedSharding:
        """An optimizer keeps its moments in trees like the parameters': the path ends alike."""
        for start in range(len(path)):
            if paths.get(path[start:]) == leaf.shape:
                return shardings[path[start:]]
        return whole

    opt_state = jax.tree_util.tree_map_with_path(follow, state.opt_state)
    watch = jax.tree.map(lambda _: whole, state.watch)
    return TrainState(whole, params, opt_state, None if state.ema is None else params, watch)


def state_like(
    layout: Layout,
    axes: Any,
    init_params: Callable[[], Any],
    optimizer: optax.GradientTransformation,
    *,
    ema: bool,
    on_bad_step: Stop | Skip | None = None,
) -> TrainState:
    """The state of a run that begins with `init_params()`, as shapes that say where they live."""
    shapes = jax.eval_shape(
        lambda: init_state(init_params(), optimizer, ema=ema, on_bad_step=on_bad_step)
    )
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        state_shardings(layout, axes, shapes),
    )


def everything(trained: Any, frozen: Any, rng: jax.Array | None) -> Any:
    """The `Join` of a run that trains all parameters."""
    return trained


def make_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    join: Join = everything,
    microbatches: int = 1,
    ema_decay: float | None = None,
    seed: int = 0,
    shardings: Any = None,
    on_bad_step: Stop | Skip | None = None,
) -> Step:
    """`step(state, batch, frozen) -> (state, metrics)`, to be jitted with the state donated.

    The objective sees the parameters that `join` makes of the state's and of `frozen`.
    The gradient is that of the mean loss over the batch's weight, however many microbatches it is
    computed in. Random numbers depend on the seed and the step alone. `shardings` of the parameters
    are those of the gradients too, also while they are summed. Metrics are float32 scalars: the
    objective's means, `grad_norm` and `param_norm`. With `on_bad_step` those of a bad step leave
    the state as it was, and `bad_step`, `bad_in_row` and `skipped` (int32) tell.
    """
    gradients = make_gradients(
        objective, join=join, microbatches=microbatches, seed=seed, shardings=shardings
    )

    def step(state: TrainState, batch: Batch, frozen: Any = None) -> tuple[TrainState, Metrics]:
        grads, sums = gradients(state.params, frozen, batch, state.step)
        with jax.named_scope("optimizer"):
            with jax.numpy_dtype_promotion("standard"):  # optax mixes integer and float scalars
                updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            ema = state.ema
            if ema_decay is not None:
                ema = optax.incremental_update(params, ema, 1 - ema_decay)
            metrics = means(sums) | {"grad_norm": optax.tree.norm(grads)}
            after = TrainState(state.step + 1, params, opt_state, ema)
            if on_bad_step is not None:
                after, told = _judged(on_bad_step, state, after, metrics)
                metrics |= told
            # No norm of the update: XLA would write the update for it, and read it again.
            metrics["param_norm"] = optax.tree.norm(after.params)
        return after, metrics

    return step


def _judged(
    on_bad_step: Stop | Skip, before: TrainState, after: TrainState, metrics: Metrics
) -> tuple[TrainState, Metrics]:
    """The state after a step, or the one before where it does not count."""
    assert before.watch is not None
    good, watch = on_bad_step.judge(
        before.watch, before.step + 1, metrics["loss"], metrics["grad_norm"]
    )
    kept = jax.tree.map(
        lambda new, old: jnp.where(good, new, old), after, before._replace(watch=None)
    )
    kept = kept._replace(step=before.step + on_bad_step.steps_done(good), watch=watch)
    return kept, {
        "bad_step": jnp.where(good, 0, watch.bad),
        "bad_in_row": watch.in_row,
        "skipped": watch.count,
    }


def make_gradients(
    objective: Objective,
    *,
    join: Join = everything,
    microbatches: int = 1,
    seed: int = 0,
    shardings: Any = None,
) -> Callable[[Any, Any, Batch, jax.Array], tuple[Any, Sums]]:
    """`gradients(params, frozen, batch, step) -> (grads, sums)` of `make_step`'s step."""

    def loss(trained: Any, frozen: Any, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Sums]:
        return objective(join(trained, frozen, rng), batch, rng)

    def value_and_grad(*arguments: Any) -> tuple[tuple[jax.Array, Sums], Any]:
        value, grads = jax.value_and_grad(loss, has_aux=True)(*arguments)
        if shardings is not None:
            grads = jax.lax.with_sharding_constraint(grads, shardings)
        return value, grads

    def summed(params: Any, frozen: Any, batch: Batch, rng: jax.Array) -> tuple[Any, Sums]:
        if microbatches == 1:
            (_, sums), grads = value_and_grad(params, frozen, batch, rng)
            return grads, sums

        # Microbatch i takes rows i, i + k, ...: each device keeps its own rows.
        def split(x: jax.Array) -> jax.Array:
            rows = x.shape[0] // microbatches
            return jnp.moveaxis(x.reshape(rows, microbatches, *x.shape[1:]), 1, 0)

        def add(carry: tuple, part: tuple) -> tuple:
            (_, sums), grads = value_and_grad(params, frozen, *part)
            return jax.tree.map(jnp.add, carry, (grads, sums)), None

        parts = (jax.tree.map(split, batch), jax.random.split(rng, microbatches))
        first = jax.tree.map(lambda x: x[0], parts)
        shapes = jax.eval_shape(lambda *part: value_and_grad(params, frozen, *part), *first)
        (_, sums), grads = shapes
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (grads, sums))
        (grads, sums), _ = jax.lax.scan(add, zeros, parts)
        return grads, sums

    def gradients(params: Any, frozen: Any, batch: Batch, step: jax.Array) -> tuple[Any, Sums]:
        rng = jax.random.fold_in(jax.random.key(seed), step)
        grads, sums = summed(params, frozen, batch, rng)
        weight = jnp.maximum(sums["loss"][1], 1.0)
        with jax.named_scope("optimizer"):
            return jax.tree.map(lambda g: g / weight.astype(g.dtype), grads), sums

    return gradients


def means(sums: Sums) -> Metrics:
    return {name: total / jnp.maximum(weight, 1.0) for name, (total, weight) in sums.items()}
