"""Examples of a task: what is scored, read from JSON lines. The kind is told from the fields.

| kind | fields of a line | scored |
|---|---|---|
| choice | `query`, `choices`, `gold` | each choice as the continuation of the query |
| partial | `context_options`, `continuation`, `gold` | one continuation after each context |
| cloze | `context`, `continuation` | the continuation |
| pairs | `good`, `bad` (`uid`, `field`) | two sentences of their own |
| answer | `question` or `query`, `answers` | a text that the model writes |

and ready requests, a line for each choice: `request: {context, continuation}`, `doc_id`, `idx`,
`label`.
"""

import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gemma_jax.data.readers import OPENERS, reading
from gemma_jax.errors import UserError

# Ready requests for the likelihood of a choice without its question bear its doc_id plus this.
UNCONDITIONAL = 1_000_000

type Pair = tuple[str, str]  # a context and a continuation


@dataclass(frozen=True)
class Example:
    """The pairs to score; `gold` is the index of the right one.

    `unconditional` are the same choices after a context that does not ask; `answers` are the right
    texts of an open question, which is the context of the one pair. `groups` have means of their
    own.
    """

    pairs: tuple[Pair, ...]
    gold: int = 0
    unconditional: tuple[Pair, ...] = ()
    answers: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """`primary` is the metric to compare; `note` says how the examples came to be."""

    name: str
    kind: str
    examples: tuple[Example, ...]
    primary: str
    shots: int = 0
    note: str = ""
    max_new_tokens: int = 32


PRIMARY = {"choice": "acc", "partial": "acc", "cloze": "acc", "pairs": "acc", "answer": "em"}


def read_task(path: str | Path, shots: int = 0) -> Task:
    """The task in a file of JSON lines (.gz, .xz, .bz2 and .zst too), named by its path.

    With `shots`, that many examples of it come before each question and are not scored.
    """
    kind, examples = read_examples(path)
    task = Task(str(path), kind, examples, PRIMARY[kind])
    return few_shot(task, shots, examples, own=True) if shots else task


def read_examples(path: str | Path) -> tuple[str, tuple[Example, ...]]:
    """The kind and the examples of a file, all of one kind."""
    lines = list(json_lines(path))
    if not lines:
        raise UserError(f"{path} holds no examples; give a file of JSON lines.")
    if "request" in lines[0][1]:
        return _ready(path, lines)
    kind, examples = "", []
    for number, line in lines:
        where = f"{path}, line {number}"
        own, example = _example(line, where)
        if kind and own != kind:
            raise UserError(f"{where} is of the kind {own}, and those before it are {kind}.")
        kind = own
        examples.append(example)
    return kind, tuple(examples)


def few_shot(task: Task, shots: int, pool: Sequence[Example], *, own: bool) -> Task:
    """Puts `shots` examples of `pool`, spread evenly over it, before each question.

    They are left out of what is scored where the pool is the task's `own`.
    """
    if task.kind == "pairs":
        raise UserError(f"{task.name} holds pairs of sentences, which take no examples before.")
    if shots >= len(pool):
        raise UserError(f"{task.name} has {len(pool)} examples to take {shots} from; ask for less.")
    chosen = [i * len(pool) // shots for i in range(shots)]
    text = "".join(solved(pool[i]) + "\n\n" for i in chosen)
    left = set(chosen) if own else set()
    examples = tuple(
        replace(example, pairs=tuple((text + context, rest) for context, rest in example.pairs))
        for i, example in enumerate(task.examples)
        if i not in left
    )
    source = "of the set itself, not scored" if own else "of another split"
    note = "; ".join(filter(None, [task.note, f"{shots} examples {source}"]))
    return replace(task, examples=examples, shots=shots, note=note)


def solved(example: Example) -> str:
    """The text of an example with its right answer."""
    context, continuation = example.pairs[example.gold]
    return context + continuation


def joined(context: str, continuation: str) -> Pair:
    """A continuation after its context: with a space between, where neither has one."""
    apart = not context or context[-1].isspace() or continuation[:1].isspace()
    return context, continuation if apart else f" {continuation}"


def json_lines(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a file of JSON lines, compressed or not, with the number of each line."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist; give a file of JSON lines.")
    opener = OPENERS.get(path.suffix.lower())
    try:
        with reading(str(path)):
            data = io.BufferedReader(opener(path)) if opener else path.open("rb")
            with io.TextIOWrapper(data, encoding="utf-8-sig") as file:
                yield from _objects(file, path)
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text.") from None


def _objects(file: Iterable[str], path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number} is not valid JSON ({error}).") from None
        if not isinstance(value, dict):
            raise UserError(f"{path}, line {number} is not a JSON object.")
        yield number, value


def _example(line: dict[str, Any], where: str) -> tuple[str, Example]:
    if "choices" in line:
        query = _text(line, "query", where)
        choices = _texts(line, "choices", where)
        pairs = tuple(joined(query, choice) for choice in choices)
        return "choice", Example(pairs, _gold(line.get("gold"), len(pairs), where))
    if "context_options" in line:
        options = _texts(line, "context_options", where)
        continuation = _text(line, "continuation", where)
        pairs = tuple(joined(option, continuation) for option in options)
        return "partial", Example(pairs, _gold(line.get("gold"), len(pairs), where))
    if "continuation" in line:
        pair = joined(_text(line, "context", where), _text(line, "continuation", where))
        return "cloze", Example((pair,))
    if "good" in line:
        pairs = (("", _text(line, "good", where)), ("", _text(line, "bad", where)))
        groups = tuple(f"{key}:{line[key]}" for key in ("uid", "field") if key in line)
        return "pairs", Example(pairs, groups=groups)
    if "answers" in line:
        question = _text(line, "query" if "query" in line else "question", where)
        answers = tuple(_texts(line, "answers", where))
        return "answer", Example((joined(question, answers[0]),), answers=answers)
    raise UserError(
        f"{where} has the fields {', '.join(line) or 'none'}, which make no example; give query, "
        "choices and gold, context_options, continuation and gold, context and continuation, good "
        "and bad, or question and answers."
    )


def _ready(
    path: str | Path, lines: Iterable[tuple[int, dict[str, Any]]]
) -> tuple[str, tuple[Example, ...]]:
    """Examples of ready requests."""
    pairs: dict[int, list[Pair]] = {}
    gold: dict[int, Any] = {}
    for number, line in lines:
        where = f"{path}, line {number}"
        request, doc = line.get("request"), line.get("doc_id")
        if not isinstance(request, dict) or not isinstance(doc, int):
            raise UserError(f"{where} has no request and doc_id like the lines before it.")
        known = pairs.setdefault(doc, [])
        if line.get("idx", len(known)) != len(known):
            raise UserError(f"{where} has idx {line['idx']} where {len(known)} should follow.")
        known.append((_text(request, "context", where), _text(request, "continuation", where)))
        gold[doc] = (line.get("label"), where)
    questions = [doc for doc in pairs if doc < UNCONDITIONAL]
    if all(len(pairs[doc]) == 1 for doc in questions):
        return "cloze", tuple(Example(tuple(pairs[doc])) for doc in questions)
    examples = tuple(
        Example(
            tuple(pairs[doc]),
            _gold(gold[doc][0], len(pairs[doc]), gold[doc][1]),
            tuple(pairs.get(doc + UNCONDITIONAL, ())),
        )
        for doc in questions
    )
    one = all(len({context for context, _ in example.pairs}) == 1 for example in examples)
    return "choice" if one else "partial", examples


def _text(line: dict[str, Any], field: str, where: str) -> str:
    value: Any = line.get(field)
    # A context may be empty; nothing else may.
    if not _is_text(value) and not (value == "" and field == "context"):
        raise UserError(f"{where} has {field}={value!r}, which should be a text.")
    return value


def _texts(line: dict[str, Any], field: str, where: str) -> list[str]:
    values = line.get(field)
    if not isinstance(values, list) or not values:
        raise UserError(f"{where} has {field}={values!r}, which should be a list of texts.")
    for value in values:
        if not _is_text(value):
            raise UserError(f"{where} has {value!r} in {field}, which should be a text.")
    return values


def _is_text(value: Any) -> bool:
    # Half of a surrogate pair, which JSON may hold, is no text.
    return isinstance(value, str) and value != "" and not re.search("[\ud800-\udfff]", value)


def _gold(value: Any, count: int, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < count:
        raise UserError(f"{where} has gold={value!r}, which should lie in 0..{count - 1}.")
    return value
