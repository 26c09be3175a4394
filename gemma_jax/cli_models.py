"""The verbs that take a finished model: generate, import, export."""

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gemma_jax import report
from gemma_jax.data.readers import json_rows
from gemma_jax.errors import PromptError, UserError

if TYPE_CHECKING:  # all import jax, which takes a second
    from gemma_jax.completion import Prompt, TextCompletion
    from gemma_jax.generation.constrain import BoundCompletion
    from gemma_jax.generation.grammar import Grammar
    from gemma_jax.generation.sampling import Sampling
    from gemma_jax.sharding import MeshConfig


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


def mesh(arguments: argparse.Namespace) -> "MeshConfig | None":
    """The mesh that was asked for, None where none was."""
    from gemma_jax.sharding import MeshConfig

    return None if arguments.mesh is None else MeshConfig(**arguments.mesh)


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
        if arguments.schema or arguments.regex or arguments.grammar:
            raise UserError("--chat is not bound to anything; give the turns as --file instead.")
        _chat(arguments, sampling)
        return
    asked = _prompts(Path(arguments.file)) if arguments.file else []
    asked = asked or [_Asked(prompt) for prompt in arguments.prompt]
    adapters = _adapters(arguments.adapter)
    names, grammars = _names(asked, adapters), _grammars(arguments, asked)
    writer = TextGenerator(arguments.checkpoint, adapters=adapters, mesh=mesh(arguments))
    settings: dict[str, Any] = {"max_new_tokens": arguments.max_new_tokens, "sampling": sampling}
    first = asked[0].prompt
    # None means the only adapter there, so a line that wants none is no stream.
    streamed = len(asked) == 1 and isinstance(first, str) and (names[0] or not adapters)
    try:
        if streamed and not (grammars or arguments.json or arguments.logprobs):
            settings |= {"stop": arguments.stop, "seed": arguments.seed, "adapter": names[0]}
            pieces = writer.stream(first, **settings)
            _write([str(first), next(pieces)])  # together: one that is refused is not printed
            _write(pieces)
            print()
            return
        prompts = [one.prompt for one in asked]
        settings["seeds"] = [(arguments.seed + i) % 2**32 for i in range(len(prompts))]
        settings["adapters"] = names
        results: Sequence[Any] = (
            writer.complete_bound(prompts, grammars, on_limit=arguments.on_limit, **settings)
            if grammars
            else writer.complete(prompts, stop=arguments.stop, **settings)
        )
    except PromptError as error:
        where = asked[error.number].where
        raise (UserError(f"{where}: {error.reason}") if where else error) from None
    rows = [_row(*pair, arguments.logprobs) for pair in zip(prompts, results, strict=True)]
    report.emit(arguments, rows, "\n\n".join(map(_as_text, rows)))


def _row(
    prompt: "Prompt", result: "TextCompletion | BoundCompletion", logprobs: bool
) -> dict[str, Any]:
    row: dict[str, Any] = {"prompt" if isinstance(prompt, str) else "messages": prompt}
    row["text"] = result.text
    key = "stopped" if hasattr(result, "stopped") else "ending"
    row[key] = getattr(result, key)
    if logprobs:
        row |= {"tokens": result.tokens, "logprobs": result.logprobs}
    return row


def _as_text(row: dict[str, Any]) -> str:
    text = row.get("prompt", "") + row["text"]
    if "logprobs" in row:
        nats = sum(value for value in row["logprobs"] if value is not None)
        text += f"\n({len(row['tokens'])} tokens, {nats:.4f} nats)"
    return text


def _write(pieces: Iterable[str]) -> None:
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()


_UNSAID = object()
_BOUND = ("schema", "regex", "grammar")


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


def _names(asked: "list[_Asked]", adapters: dict[str, str]) -> list[str | None]:
    """The adapter of each prompt: the one that it names, or the only one."""
    for number, one in enumerate(asked, 1):
        if one.adapter is _UNSAID and len(adapters) > 1:
            raise UserError(
                f"{one.where or f'prompt {number}'} names no adapter, and there are "
                f"{', '.join(adapters)}; give lines of --file an `adapter`, null for none."
            )
    only = next(iter(adapters), None)
    return [only if one.adapter is _UNSAID else one.adapter for one in asked]


class _Asked(NamedTuple):
    prompt: "Prompt"
    where: str = ""  # its line
    adapter: Any = _UNSAID
    grammar: "Grammar | None" = None


def _grammars(arguments: argparse.Namespace, asked: "list[_Asked]") -> "list[Grammar]":
    """What each text is bound to; empty where none is."""
    common = _grammar(
        {
            "schema": arguments.schema and _read(Path(arguments.schema)),
            "regex": arguments.regex,
            "grammar": arguments.grammar and _read(Path(arguments.grammar)),
        }
    )
    chosen = [one.grammar or common for one in asked]
    found = [one for one in chosen if one is not None]
    if found and arguments.stop:
        raise UserError("a bound text ends where its grammar does; leave --stop out.")
    if 0 < len(found) < len(asked):
        raise UserError(
            f"{asked[chosen.index(None)].where} has no schema, regex or grammar, and others have; "
            "give it one, or one for all as an option."
        )
    return found


def _grammar(given: dict[str, Any]) -> "Grammar | None":
    """The grammar of the one kind that is given."""
    kinds = [kind for kind in _BOUND if given.get(kind) is not None]
    if not kinds:
        return None
    from gemma_jax.generation.grammar import json_schema, lark, regex

    if len(kinds) > 1:
        raise UserError(f"a text is bound to {kinds[0]} and {kinds[1]} at once; give one of them.")
    value = given[kinds[0]]
    if kinds[0] == "schema":
        return json_schema(value)
    if not isinstance(value, str):
        raise UserError(f"{kinds[0]}={value!r:.60} must be a text.")
    return regex(value) if kinds[0] == "regex" else lark(value)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        cause = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{path} cannot be read: {cause}; give a file in UTF-8.") from None


def _prompts(path: Path) -> "list[_Asked]":
    """The prompts of a file of JSON lines, each with what it asks for."""
    if not path.exists() or path.is_dir():
        raise UserError(f"{path} cannot be read: it is no file; give JSON lines in UTF-8.")
    prompts = [_prompt(where, value) for where, value in json_rows(str(path), once=True)]
    if not prompts:
        raise UserError(f"{path} is empty; give a line a prompt.")
    return prompts


def _prompt(where: str, value: Any) -> "_Asked":
    """A line: `prompt`, or the `messages` of a conversation, and `adapter`, `schema`, `regex` or
    `grammar` where it asks for one."""
    keys = [key for key in ("prompt", "messages") if isinstance(value, dict) and key in value]
    kinds = {"prompt": str, "messages": list}
    if len(keys) != 1 or not isinstance(value[keys[0]], kinds[keys[0]]):
        raise UserError(f"{where} must have either a text `prompt` or a list `messages`.")
    for name in value:
        if name not in (keys[0], "adapter", *_BOUND):
            raise UserError(
                f"{where} has an unknown {name!r:.60}; a line may have prompt or messages, "
                f"adapter, {', '.join(_BOUND)}."
            )
    try:
        grammar = _grammar(value)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    adapter = value.get("adapter", _UNSAID)
    if adapter is not _UNSAID and not isinstance(adapter, str | None):
        raise UserError(f"{where}: adapter={adapter!r:.60} must be the name of one.")
    return _Asked(value[keys[0]], where, adapter, grammar)


def _chat(arguments: argparse.Namespace, sampling: "Sampling") -> None:
    from gemma_jax.completion import Conversation, TextGenerator

    talk = Conversation(
        TextGenerator(
            arguments.checkpoint, adapters=_adapters(arguments.adapter), mesh=mesh(arguments)
        ),
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
