"""What a finished model answers to held-out conversations, free or bound to a schema."""

import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gemma_jax import runs
from gemma_jax.data.conversations import Conversation, read_all
from gemma_jax.data.tokenizer import Tokenizer
from gemma_jax.errors import UserError
from gemma_jax.eval.replies import (
    TEXT_END,
    PromptFormat,
    Scores,
    check_prompts,
    encode_prompts,
    last_turn,
    score_reply,
    totals,
)
from gemma_jax.files import read_json, write_text
from gemma_jax.generation.constrain import write_bound_texts
from gemma_jax.generation.decode import Generator
from gemma_jax.generation.grammar import GrammarTokenizer, json_schema
from gemma_jax.generation.sampling import Sampling
from gemma_jax.generation.schemas import check_schema, is_valid
from gemma_jax.generation.text import write_texts
from gemma_jax.progress import progress
from gemma_jax.sharding import MeshConfig, active, chosen_layout
from gemma_jax.tuning.sft import Scorer

_GREEDY = Sampling(temperature=0)


class Reply(NamedTuple):
    text: str
    tokens: int
    ended: bool  # by itself; the limit neither cut nor closed it


def evaluate_replies(
    loaded: runs.LoadedModel,
    conversations: str | Path,
    *,
    schema: str | Path | dict[str, Any] | None = None,
    bound: bool = True,
    scorer: Scorer | None = None,
    few_shot: str | None = None,
    prompt_format: PromptFormat = "chat",
    limit: int | None = None,
    max_new_tokens: int = 256,
    batch_tokens: int = 8192,
    mesh: MeshConfig | None = None,
    replies: str | Path | None = None,
) -> dict[str, Any]:
    """The model speaks the last of its turns in each conversation of a file, greedily.

    Args:
      conversations: JSON lines (`data.conversations`).
      schema: a JSON schema or its file. `json` is then the share of replies that are JSON, `valid`
        of those that the schema allows.
      bound: whether replies are held to that schema, or only judged by it.
      scorer: see `eval.replies`.
      few_shot: "FILE:K": the first K conversations of that file come before each.
      prompt_format: "chat", or "text" for models that were never tuned; a free reply then ends at
        an empty line.
      limit: conversations at most, the first of the file.
      batch_tokens: tokens at once; more is faster, until the memory is full.
      mesh: the one that the model was loaded with.
      replies: a file of JSON lines for what was asked, wanted and said.

    Returns {"examples", "shots", "prompt_format", "bound", "seconds", "new_tokens", "ended",
    "metrics": {name: {"value", "stderr"}}}; `ended` counts the replies that no limit ended.
    """
    began = time.monotonic()
    tokenizer = loaded.tokenizer
    asked = read_all((str(conversations),), tokenizer)[:limit]
    shots = _shots(few_shot, tokenizer)
    rules = read_json(schema, "a JSON schema") if isinstance(schema, (str, Path)) else schema
    if rules is not None:
        check_schema(rules)
    prompts = encode_prompts(tokenizer, asked, shots=shots, prompt_format=prompt_format)
    check_prompts(loaded.model, prompts, asked, max_new_tokens)
    score_reply(scorer, asked[0], last_turn(asked[0])[1])  # its mistakes show at once
    layout = chosen_layout(mesh)
    generator = Generator(loaded.model, loaded.params, layout)
    with active(layout), progress("replies", len(asked)) as advance:
        settings: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "sampling": _GREEDY,
            "batch_tokens": batch_tokens,
            "advance": advance,
        }
        if rules is not None and bound:
            pieces = GrammarTokenizer(tokenizer, loaded.model.config.vocab_size)
            grammars = [json_schema(rules)] * len(prompts)
            held = write_bound_texts(generator, tokenizer, pieces, prompts, grammars, **settings)
            said = [Reply(one.text, len(one.tokens), one.ending == "complete") for one in held]
        else:
            stop = (TEXT_END,) if prompt_format == "text" else ()
            free = write_texts(generator, tokenizer, prompts, stop=stop, **settings)
            said = [Reply(one.text, len(one.tokens), one.stopped) for one in free]
    rows = [
        score_reply(scorer, one, reply.text) | _validity(rules, reply.text)
        for one, reply in zip(asked, said, strict=True)
    ]
    if replies is not None:
        _write(Path(replies), asked, said, rows)
    return {
        "examples": len(asked),
        "shots": len(shots),
        "prompt_format": prompt_format,
        "bound": rules is not None and bound,
        "seconds": round(time.monotonic() - began, 2),
        "new_tokens": int(np.sum([reply.tokens for reply in said])),
        "ended": sum(reply.ended for reply in said),
        "metrics": totals(rows),
    }


def _shots(few_shot: str | None, tokenizer: Tokenizer) -> list[Conversation]:
    if few_shot is None:
        return []
    found = re.fullmatch(r"(.+):(\d+)", few_shot)
    if not found:
        raise UserError(f"few-shot '{few_shot}' must be FILE:K, such as train.jsonl:8.")
    count, there = int(found[2]), read_all((found[1],), tokenizer)
    if count > len(there):
        raise UserError(
            f"few-shot asks for {count} conversations, and {found[1]} has {len(there)}; ask for "
            "fewer."
        )
    return there[:count]


def _validity(rules: dict[str, Any] | None, reply: str) -> Scores:
    if rules is None:
        return {}
    try:
        value = json.loads(reply, parse_constant=_no_number)
    except (ValueError, RecursionError):
        return {"json": (0.0, 1.0), "valid": (0.0, 1.0)}
    return {"json": (1.0, 1.0), "valid": (float(is_valid(rules, value)), 1.0)}


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def _write(
    path: Path, asked: Sequence[Conversation], said: Sequence[Reply], rows: Sequence[Scores]
) -> None:
    lines = []
    for one, reply, row in zip(asked, said, rows, strict=True):
        before, wanted = last_turn(one)
        scores = {name: total / weight for name, (total, weight) in row.items() if weight}
        line: dict[str, Any] = {"place": one.place, "messages": list(before), "wanted": wanted}
        line |= {"reply": reply.text, "ended": reply.ended, "scores": scores}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    write_text(path, "".join(lines))
