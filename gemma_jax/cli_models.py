"""The verbs that take a finished model: generate, import, export."""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_jax import report
from gemma_jax.errors import UserError

if TYPE_CHECKING:  # both import jax, which takes a second
    from gemma_jax.completion import Prompt, TextCompletion
    from gemma_jax.generation.sampling import Sampling


def import_(arguments: argparse.Namespace) -> None:
    from gemma_jax.exchange import import_model

    value = import_model(arguments.source, arguments.path, base=arguments.base)
    report.emit(arguments, value, report.figures(value))


def export(arguments: argparse.Namespace) -> None:
    from gemma_jax.exchange import export_model

    value = export_model(
        arguments.checkpoint, arguments.path, format=arguments.format, dtype=arguments.dtype
    )
    report.emit(arguments, value, report.figures(value))


def generate(arguments: argparse.Namespace) -> None:
    from gemma_jax.completion import TextGenerator
    from gemma_jax.generation.sampling import Sampling

    sampling = Sampling(
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        min_p=arguments.min_p,
        repetition_penalty=arguments.repetition_penalty,
    )
    if arguments.chat:
        _chat(arguments, sampling)
        return
    asked = _prompts(Path(arguments.file)) if arguments.file else []
    prompts: list[Prompt] = arguments.prompt or [prompt for prompt, _ in asked]
    named = any(adapter is not _UNSAID for _, adapter in asked)
    names = [None if name is _UNSAID else name for _, name in asked] if named else None
    writer = TextGenerator(arguments.checkpoint, adapters=_adapters(arguments.adapter))
    if (
        len(prompts) == 1
        and isinstance(prompts[0], str)
        and not (arguments.json or arguments.logprobs)
    ):
        pieces = writer.stream(
            prompts[0],
            max_new_tokens=arguments.max_new_tokens,
            sampling=sampling,
            seed=arguments.seed,
            stop=arguments.stop,
        )
        first = next(pieces)  # a prompt that is refused is not printed
        _write([prompts[0], first])
        _write(pieces)
        print()
        return
    results = writer.complete(
        prompts,
        max_new_tokens=arguments.max_new_tokens,
        sampling=sampling,
        seeds=[arguments.seed + i for i in range(len(prompts))],
        stop=arguments.stop,
        adapters=names,
    )
    rows = [_row(*pair, arguments.logprobs) for pair in zip(prompts, results, strict=True)]
    report.emit(arguments, rows, "\n\n".join(map(_as_text, rows)))


def _row(prompt: "Prompt", result: "TextCompletion", logprobs: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"prompt" if isinstance(prompt, str) else "messages": prompt}
    row |= {"text": result.text, "stopped": result.stopped}
    if logprobs:
        row |= {"tokens": result.tokens, "logprobs": result.logprobs}
    return row


def _as_text(row: dict[str, Any]) -> str:
    text = row.get("prompt", "") + row["text"]
    if "logprobs" in row:
        text += f"\n({len(row['tokens'])} tokens, {sum(row['logprobs']):.4f} nats)"
    return text


def _write(pieces: Iterable[str]) -> None:
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()


_UNSAID = object()


def _adapters(given: list[str]) -> dict[str, str]:
    """Folders by name: that before `=`, or that of the folder."""
    named: dict[str, str] = {}
    for text in given:
        name, equals, folder = text.partition("=")
        name, folder = (name, folder) if equals else (Path(text).name, text)
        if name in named:
            raise UserError(f"two adapters are called '{name}'; write --adapter NAME={folder}.")
        named[name] = folder
    return named


def _prompts(path: Path) -> "list[tuple[Prompt, Any]]":
    """(prompt, name of its adapter) of a JSONL file: `prompt`, or the `messages` of a conversation,
    a line, with `adapter` where it asks for one."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        cause = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{path} cannot be read: {cause}; give a JSONL file in UTF-8.") from None
    prompts: list[tuple[Prompt, Any]] = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            prompts.append(_prompt(line, f"{path} line {number}"))
    if not prompts:
        raise UserError(f"{path} is empty; give a line a prompt.")
    return prompts


def _prompt(line: str, where: str) -> "tuple[Prompt, Any]":
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON: {error}; mend it.") from None
    keys = [key for key in ("prompt", "messages") if isinstance(value, dict) and key in value]
    if keys == ["prompt"] and isinstance(value["prompt"], str):
        return value["prompt"], value.get("adapter", _UNSAID)
    if keys == ["messages"] and isinstance(value["messages"], list):
        return value["messages"], value.get("adapter", _UNSAID)
    raise UserError(f"{where} must have either a text `prompt` or a list `messages`.")


def _chat(arguments: argparse.Namespace, sampling: "Sampling") -> None:
    from gemma_jax.completion import Conversation, TextGenerator

    talk = Conversation(
        TextGenerator(arguments.checkpoint, adapters=_adapters(arguments.adapter)),
        max_new_tokens=arguments.max_new_tokens,
        sampling=sampling,
        seed=arguments.seed,
    )
    for line in _spoken():
        _write(talk.say(line))
        print()


def _spoken() -> Iterator[str]:
    """What is typed, a line a turn, until the end of the input; a terminal shows a sign for it."""
    if sys.stdin.isatty():
        print("A line is a turn; Ctrl-D ends.", file=sys.stderr)
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()
