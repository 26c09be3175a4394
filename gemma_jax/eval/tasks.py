"""Scores of a model on tasks: requests from examples, metrics from log-likelihoods.

Tokens are cut as lm-evaluation-harness cuts them, so that its numbers and ours compare: whitespace
at the end of a context goes to the continuation, context and whole are encoded, and the whole's ids
beyond the context's are the continuation's. BOS comes first.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gemma_jax.data.line_encoder import LineEncoder
from gemma_jax.data.tokenizer import BOS, Tokenizer
from gemma_jax.errors import UserError
from gemma_jax.eval.answers import matches, write_answers
from gemma_jax.eval.examples import Example, Pair, Task
from gemma_jax.eval.likelihood import Likelihood, Request, likelihoods
from gemma_jax.generation.decode import Generator
from gemma_jax.model.transformer import Transformer

type Metrics = dict[str, dict[str, float | None]]
_ANSWER_STOPS = ("\n",)
_MAX_CHOICES = 64


def run_task(
    model: Transformer,
    params: Any,
    tokenizer: Tokenizer,
    task: Task,
    *,
    batch_tokens: int = 8192,
    advance: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:
    """What a task is and its metrics, each `{"value", "stderr"}`; those of groups apart.

    `advance` is told of examples done. A context over the model's is cut at its start, as
    lm-evaluation-harness does; `cut` counts those.
    """
    examples = task.examples
    cut = 0
    if task.kind == "answer":
        scores = _answered(model, params, tokenizer, task, batch_tokens, advance)
    else:
        scores, cut = _scored(model, params, tokenizer, task, batch_tokens, advance)
    groups = defaultdict(list)
    for example, score in zip(examples, scores, strict=True):
        for group in example.groups:
            groups[group].append(score)
    result: dict[str, Any] = {
        "kind": task.kind,
        "examples": len(examples),
        "shots": task.shots,
        "data": task.note,
        "primary": task.primary,
        "metrics": means(scores),
    }
    if cut:
        result["cut"] = cut
    if groups:
        result["groups"] = {name: means(scores) for name, scores in sorted(groups.items())}
    return result


def limited(task: Task, limit: int | None) -> Sequence[Example]:
    """The first `limit` examples, or of several groups the first of each by turns."""
    if limit is None or limit >= len(task.examples):
        return task.examples
    rank: dict[str, int] = defaultdict(int)
    order = []
    for number, example in enumerate(task.examples):
        group = example.groups[0] if example.groups else ""
        order.append((rank[group], number))
        rank[group] += 1
    return tuple(task.examples[number] for number in sorted(n for _, n in sorted(order)[:limit]))


def encode_pair(
    encoder: Tokenizer | LineEncoder, context: str, continuation: str
) -> tuple[list[int], ...]:
    """The ids of a context, BOS in front, and of what follows it."""
    kept = context.rstrip()
    continuation = context[len(kept) :] + continuation
    before = encoder.encode(kept)
    after = encoder.encode(kept + continuation)[len(before) :]
    # Where both merge into one piece nothing is left: then the continuation stands on its own.
    return [BOS, *before], after or encoder.encode(continuation)


def score_pairs(
    model: Transformer,
    params: Any,
    tokenizer: Tokenizer,
    pairs: Sequence[Pair],
    *,
    batch_tokens: int = 8192,
    advance: Callable[[int], None] = lambda _: None,
    units: int | None = None,
) -> tuple[list[Likelihood], list[int], int]:
    """(likelihoods, tokens of each continuation, contexts cut at their start) of pairs.

    `advance` is told of `units` in all, of one a pair by default.
    """
    requests: list[Request] = []
    sizes, cut, last = [], 0, None
    encoder = LineEncoder(tokenizer)
    for context, continuation in pairs:
        before, after = encode_pair(encoder, context, continuation)
        room = model.config.max_seq_len - len(after)
        if room < 1:
            raise UserError(
                f"a continuation has {len(after)} tokens and leaves no room in the model's "
                f"context of {model.config.max_seq_len}: {continuation[:60]!r}."
            )
        if len(before) > room:
            before, cut = [BOS, *before[len(before) - room + 1 :]], cut + 1
        sizes.append(len(after))
        # Choices that follow one context are read after it once, but what a batch is made of must
        # stay small.
        if before == last and len(requests[-1].continuations) < _MAX_CHOICES:
            requests[-1] = Request(before, [*requests[-1].continuations, after])
        else:
            requests.append(Request(before, [after]))
        last = before
    total = len(pairs) if units is None else units
    done = 0

    def tell(count: int) -> None:
        nonlocal done
        before, done = total * done // len(requests), done + count
        if new := total * done // len(requests) - before:
            advance(new)

    found = likelihoods(model, params, requests, batch_tokens=batch_tokens, advance=tell)
    flat = [one for request in found for one in request]
    if not all(math.isfinite(one.logprob) for one in flat):
        raise UserError(
            "the model gives log-likelihoods that are no numbers; its training has diverged, or "
            "its weights are damaged."
        )
    return flat, sizes, cut


def _scored(
    model: Transformer,
    params: Any,
    tokenizer: Tokenizer,
    task: Task,
    batch_tokens: int,
    advance: Callable[[int], None],
) -> tuple[list[dict[str, float]], int]:
    """The scores of each example by log-likelihood, and how many contexts were cut."""
    # Examples of one group are apt to begin alike; what they share is read once.
    parts: dict[str, list[int]] = defaultdict(list)
    for number, example in enumerate(task.examples):
        parts[example.groups[0] if example.groups else ""].append(number)
    scores: list[dict[str, float]] = [{} for _ in task.examples]
    cut = 0
    for part in parts.values():
        pairs = [pair for number in part for pair in task.examples[number].pairs]
        found, sizes, own_cut = score_pairs(
            model,
            params,
            tokenizer,
            pairs,
            batch_tokens=batch_tokens,
            advance=advance,
            units=len(part),
        )
        alone = [pair for number in part for pair in task.examples[number].unconditional]
        base: list[Likelihood] = []
        if alone:
            base = score_pairs(model, params, tokenizer, alone, batch_tokens=batch_tokens)[0]
        cut += own_cut
        at = at_alone = 0
        for number in part:
            example = task.examples[number]
            n, m = len(example.pairs), len(example.unconditional)
            scores[number] = example_scores(
                task.kind,
                example,
                found[at : at + n],
                sizes[at : at + n],
                base[at_alone : at_alone + m],
            )
            at, at_alone = at + n, at_alone + m
    return scores, cut


def example_scores(
    kind: str,
    example: Example,
    found: Sequence[Likelihood],
    sizes: Sequence[int],
    alone: Sequence[Likelihood] = (),
) -> dict[str, float]:
    """The scores of one example; `sizes` are tokens of its continuations."""
    logprobs = np.asarray([one.logprob for one in found])
    if kind == "cloze":
        size = len(example.pairs[0][1].encode())
        return {"acc": float(found[0].greedy), "nats": -logprobs[0], "bytes": float(size)}

    def right(values: np.ndarray) -> float:
        return float(int(np.argmax(values)) == example.gold)

    scores = {"acc": right(logprobs)}
    if kind == "choice":
        # The space that joins a choice to its context is no character of it.
        letters = np.asarray([max(1, len(text.lstrip())) for _, text in example.pairs])
        scores["acc_norm"] = right(logprobs / letters)
        scores["acc_per_token"] = right(logprobs / np.asarray(sizes))
        if alone:
            scores["acc_uncond"] = right(logprobs - np.asarray([one.logprob for one in alone]))
    return scores


def means(scores: Sequence[dict[str, float]]) -> Metrics:
    """The metrics of examples, with standard errors (None of a single example)."""
    names = list(scores[0])
    values = {name: np.asarray([score[name] for score in scores], np.float64) for name in names}
    metrics: Metrics = {
        name: {"value": float(x.mean()), "stderr": _stderr(x)}
        for name, x in values.items()
        if name not in ("nats", "bytes")
    }
    if "nats" in values:
        nats, size = values["nats"], values["bytes"]
        perplexity = math.exp(min(nats.mean(), 700.0))
        error = _stderr(nats)  # of exp(x) by its slope, and of a ratio by its linear part
        metrics["perplexity"] = {
            "value": perplexity,
            "stderr": None if error is None else perplexity * error,
        }
        ratio = nats.sum() / size.sum()
        error = _stderr((nats - ratio * size) / size.mean())
        metrics["bits_per_byte"] = {
            "value": float(ratio / math.log(2)),
            "stderr": None if error is None else error / math.log(2),
        }
    return metrics


def _stderr(x: np.ndarray) -> float | None:
    """Of the mean; of zeros and ones it is sqrt(p (1 - p) / (n - 1))."""
    return float(x.std(ddof=1) / math.sqrt(len(x))) if len(x) > 1 else None


def _answered(
    model: Transformer,
    params: Any,
    tokenizer: Tokenizer,
    task: Task,
    batch_tokens: int,
    advance: Callable[[int], None],
) -> list[dict[str, float]]:
    texts = write_answers(
        Generator(model, params),
        tokenizer,
        [example.pairs[0][0] for example in task.examples],
        stop=_ANSWER_STOPS,
        max_new_tokens=task.max_new_tokens,
        batch_tokens=batch_tokens,
        advance=advance,
    )
    return [
        {"em": float(matches(text, example.answers))}
        for text, example in zip(texts, task.examples, strict=True)
    ]
