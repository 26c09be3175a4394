"""The verb that scores a finished model: on text, on tasks, on replies to conversations."""

import argparse
from pathlib import Path
from typing import Any

from gemma_jax import report
from gemma_jax.errors import UserError
from gemma_jax.files import write_json

# What only some kinds of evaluation know, and for which of them it is.
_ONLY = {
    "limit": ("tasks", "conversations"),
    "output": ("tasks", "conversations"),
    "schema": ("conversations",),
    "free": ("conversations",),
    "scorer": ("conversations",),
    "few_shot": ("conversations",),
    "replies": ("conversations",),
}


def evaluate(arguments: argparse.Namespace) -> None:
    given = [name for name in ("tasks", "conversations") if getattr(arguments, name) is not None]
    if arguments.data or arguments.source:
        given.append("text")
    if len(given) > 1:
        raise UserError(
            "give one of text (--data, --source), tasks (--tasks) and --conversations, not more."
        )
    kind = given[0] if given else "text"
    for name, kinds in _ONLY.items():
        if getattr(arguments, name) and kind not in kinds:
            option = name.replace("_", "-")
            raise UserError(f"--{option} is for {' and '.join(kinds)}; give --{kinds[0]} too.")
    {"tasks": _tasks, "conversations": _conversations, "text": _text}[kind](arguments)


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What every kind takes."""
    from gemma_jax.sharding import MeshConfig
    from gemma_jax.tuning.qat import Qat

    scheme = arguments.quantization
    return {
        "compute_dtype": arguments.compute_dtype,
        "quantization": None if scheme is None else Qat(scheme=scheme),
        "mesh": None if arguments.mesh is None else MeshConfig(**arguments.mesh),
    }


def _text(arguments: argparse.Namespace) -> None:
    from gemma_jax.trained import evaluate

    result = evaluate(
        arguments.checkpoint,
        data=arguments.data,
        sources=tuple(arguments.source or ()),
        text_field=arguments.text_field,
        seq_len=arguments.seq_len,
        batch_size=arguments.batch_size,
        **_settings(arguments),
    )
    report.emit(arguments, result, report.figures(result))


def _tasks(arguments: argparse.Namespace) -> None:
    from gemma_jax.trained import evaluate_tasks

    result = evaluate_tasks(
        arguments.checkpoint,
        [name for name in arguments.tasks.split(",") if name],
        limit=arguments.limit,
        batch_tokens=arguments.batch_tokens,
        output=arguments.output,
        **_settings(arguments),
    )
    report.emit(arguments, result, report.scores(result))


def _conversations(arguments: argparse.Namespace) -> None:
    from gemma_jax.experiment_file import load_function
    from gemma_jax.replied import evaluate_replies
    from gemma_jax.runs import load_model
    from gemma_jax.sharding import chosen_layout

    if arguments.free and not arguments.schema:
        raise UserError("--free is about a schema; give --schema FILE too, or leave --free out.")
    scorer = arguments.scorer and load_function(arguments.scorer)
    settings = _settings(arguments)
    mesh = settings.pop("mesh")
    found = evaluate_replies(
        load_model(arguments.checkpoint, layout=chosen_layout(mesh), **settings),
        arguments.conversations,
        schema=arguments.schema,
        bound=not arguments.free,
        scorer=scorer,
        few_shot=arguments.few_shot,
        prompt_format=arguments.prompt_format,
        limit=arguments.limit,
        max_new_tokens=arguments.max_new_tokens,
        batch_tokens=arguments.batch_tokens,
        mesh=mesh,
        replies=arguments.replies,
    )
    result = {
        "checkpoint": arguments.checkpoint,
        "quantization": arguments.quantization,
        "conversations": arguments.conversations,
        **found,
    }
    if arguments.output is not None:
        write_json(arguments.output, result)
    report.emit(arguments, result, report.replies(result, Path(arguments.conversations).name))
