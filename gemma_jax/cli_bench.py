"""The verb `bench`: options to descriptions, and a result to a table."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_jax import report
from gemma_jax.errors import Interrupted, UserError

if TYPE_CHECKING:  # it imports jax, which takes a second
    from gemma_jax.bench.config import BenchConfig

_DECODE_BATCHES = (1, 64)


def bench(arguments: argparse.Namespace) -> None:
    from gemma_jax.bench import run, sweep, table

    try:
        if arguments.sweep is not None:
            points = sweep.points(arguments)
            for changed in points.values():
                _configs(changed)  # refuses a bad point before the first is run
            path = Path(arguments.plot or f"bench-{arguments.what}-{sweep.name(arguments)}.png")
            value = sweep.run_points(arguments, points, path)
            report.emit(arguments, value, table.swept(value))
            return
        if arguments.plot is not None:
            raise UserError("--plot draws a sweep; give --sweep too, such as seq_len=512,1024.")
        configs = _configs(arguments)
        value = run.bench(configs, against=arguments.against, peer_python=arguments.peer_python)
    except KeyboardInterrupt:
        raise Interrupted("stopped; a measurement keeps nothing.") from None
    report.emit(arguments, value, table.text(value))


def _configs(arguments: argparse.Namespace) -> "list[BenchConfig]":
    """What is to be measured: one description, or one for each default batch of `decode`."""
    from gemma_jax.bench.config import TOKENS, BenchConfig, default_sizes

    model = _model(arguments)
    sizes = default_sizes(arguments.what, model)
    if arguments.seq_len is not None:
        sizes["seq_len"] = arguments.seq_len
    if arguments.steps is not None:
        sizes["steps"] = arguments.steps
    batches: tuple[int, ...] = (arguments.batch,)
    if arguments.batch is None and arguments.what == "decode" and arguments.batch_tokens is None:
        batches = _DECODE_BATCHES
    elif arguments.batch is None:
        tokens = arguments.batch_tokens or TOKENS
        if tokens % sizes["seq_len"] and arguments.batch_tokens is not None:
            raise UserError(
                f"--batch-tokens {tokens} is no multiple of {sizes['seq_len']} tokens a sequence; "
                "change it or --seq-len."
            )
        batches = (max(1, tokens // sizes["seq_len"]),)
    return [
        BenchConfig(
            what=arguments.what,
            model=model,
            batch=batch,
            documents=arguments.documents,
            microbatches=arguments.microbatches,
            repeats=arguments.repeats,
            mesh=_mesh(arguments),
            data=arguments.data,
            shards=arguments.shards,
            **sizes,
        )
        for batch in batches
    ]


def _model(arguments: argparse.Namespace) -> Any:
    from gemma_jax.model.config import PRESETS
    from gemma_jax.settings import override, parse_assignments

    if arguments.preset not in PRESETS:
        raise UserError(
            f"--preset '{arguments.preset}' is no preset; choose one of {', '.join(PRESETS)}."
        )
    options = {
        "attn_pattern": arguments.pattern,
        "sliding_window": arguments.window,
        "remat": arguments.remat,
        "compute_dtype": arguments.compute_dtype,
    }
    changes = {name: value for name, value in options.items() if value is not None}
    return override(PRESETS[arguments.preset](), changes | parse_assignments(arguments.set, {}))


def _mesh(arguments: argparse.Namespace) -> Any:
    from gemma_jax.settings import override, parse_assignments
    from gemma_jax.sharding import MeshConfig

    given = arguments.mesh.split(",") if arguments.mesh else []
    changes = parse_assignments(given, {})
    if arguments.rules is not None:
        changes["rules"] = arguments.rules
    return override(MeshConfig(), changes)
