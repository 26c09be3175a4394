"""Training steps of google-tunix's Gemma 3 as it is: AdamW, weights in the compute dtype.

    python tunix_train.py --batch 8 --seq-len 2048

Its layers are always five local ones and a global one.
"""

import functools
import importlib.util
import sys
import types
from typing import Any

import common


def _model_module() -> Any:
    """tunix.models.gemma3.model, past the package's __init__: that one wants every trainer's
    dependencies."""
    spec = importlib.util.find_spec("tunix")
    if spec is None or spec.submodule_search_locations is None:
        sys.exit("google-tunix is not installed here")
    package = types.ModuleType("tunix")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules["tunix"] = package
    return importlib.import_module("tunix.models.gemma3.model")


def main() -> None:
    parser = common.parser(__doc__, batch=8, seq_len=2048, steps=10)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--microbatches", type=int, default=1, choices=(1,))
    options = parser.parse_args()
    module = _model_module()

    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx

    config = _config(module, options.model)
    config.param_dtype = jnp.dtype(options.dtype)
    graph, state = nnx.split(module.Gemma3(config, rngs=nnx.Rngs(0)))
    optimizer = optax.adamw(1e-3, b1=0.9, b2=0.95, weight_decay=0.1)
    moments = optimizer.init(state)

    def mean_loss(state: Any, tokens: Any) -> Any:
        T = tokens.shape[1]
        positions = jnp.broadcast_to(jnp.arange(T), tokens.shape)
        mask = jnp.tril(jnp.ones((1, T, T), bool))
        logits = nnx.merge(graph, state)(tokens, positions, None, mask)[0]
        logits = logits[:, :-1].astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(state: Any, moments: Any, tokens: Any) -> tuple[Any, Any, Any]:
        loss, gradients = jax.value_and_grad(mean_loss)(state, tokens)
        updates, moments = optimizer.update(gradients, moments, state)
        return optax.apply_updates(state, updates), moments, loss

    drawn = jnp.asarray(common.batches(options, 1 + options.warmup + options.steps), jnp.int32)
    losses = []

    def run(steps: int) -> None:
        nonlocal state, moments
        for i in range(steps):
            state, moments, loss = step(state, moments, drawn[i])
        losses.append(float(loss))

    first = common.timed(lambda: run(1))
    run(options.warmup)
    times = common.repeated(lambda: run(options.steps), options.repeats)
    device = jax.devices()[0]
    row = common.row(
        options,
        "train",
        times,
        options.steps * options.batch * options.seq_len,
        options.steps,
        loss=losses[-1],
        peak_bytes=(device.memory_stats() or {}).get("peak_bytes_in_use"),
        compile_s=first,
    )
    common.emit("tunix", f"1 x {device.device_kind}", ("jax", "flax", "google-tunix"), [row])


def _config(module: Any, model: dict[str, Any]) -> Any:
    config = module.ModelConfig.gemma3_270m()
    length = model["num_layers"]
    if common.letters(model) != ("LLLLLG" * length)[:length]:
        sys.exit("this peer knows the pattern LLLLLG alone")
    common.refuse(model, {"qk_norm": True, "post_norms": True, "tied_embedding": True})
    names = {
        "num_layers": "num_layers",
        "num_embed": "vocab_size",
        "embed_dim": "embed_dim",
        "hidden_dim": "mlp_dim",
        "num_heads": "num_heads",
        "head_dim": "head_dim",
        "num_kv_heads": "num_kv_heads",
        "sliding_window_size": "sliding_window",
    }
    for theirs, ours in names.items():
        if not hasattr(config, theirs):
            sys.exit(f"this version of tunix has no setting {theirs}")
        setattr(config, theirs, model[ours])
    return config


if __name__ == "__main__":
    main()
