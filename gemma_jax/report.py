"""What verbs print for a person; `--json` prints the values themselves."""

import argparse
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def emit(arguments: argparse.Namespace, value: Any, text: str) -> None:
    """Prints `value` as one JSON value where `--json` asks for it, else `text`."""
    if arguments.json:
        print(json.dumps(_finite(value), ensure_ascii=False, allow_nan=False))
    else:
        print(text)


def _finite(value: Any) -> Any:
    """`value` with null for every number that JSON cannot hold (NaN, infinity)."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def figures(values: Mapping[str, Any]) -> str:
    """A line for each value."""
    return "\n".join(
        f"{name.replace('_', ' '):<30}{_spell(value)}" for name, value in values.items()
    )


def tokens(manifest: Mapping[str, Any], folder: str | Path) -> str:
    """The manifest of a token set."""
    lines = [f"{'':<10}{'documents':>14}{'tokens':>18}{'bytes':>18}"]
    for name, split in manifest["splits"].items():
        counts = (split["documents"], split["tokens"], split["bytes"])
        lines.append("{:<10}{:>14,}{:>18,}{:>18,}".format(name, *counts))
    vocabulary, dropped = manifest["tokenizer"]["vocab_size"], manifest["duplicates_dropped"]
    lines.append(f"vocabulary {vocabulary:,}, duplicates dropped {dropped:,}; see {folder}")
    return "\n".join(lines)


def scores(result: Mapping[str, Any]) -> str:
    """The result of tasks; the metric to compare is marked."""
    rows = [("task", "shots", "examples", "metric", "value", "±")]
    for name, task in result["tasks"].items():
        head = (name, str(task["shots"]), f"{task['examples']:,}")
        for metric, found in task["metrics"].items():
            mark = "*" if metric == task["primary"] else ""
            error = "" if found["stderr"] is None else f"{found['stderr']:.4f}"
            rows.append((*head, metric + mark, f"{found['value']:.4f}", error))
            head = ("", "", "")
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            text.rjust(width) if column in (1, 2, 4, 5) else text.ljust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def replies(result: Mapping[str, Any], name: str) -> str:
    """What the replies to conversations are worth."""
    table = scores({"tasks": {name: {**result, "primary": "exact_match"}}})
    how = "bound to the schema" if result["bound"] else "free"
    count, rest = result["examples"], result["examples"] - result["ended"]
    limit = f", {rest} of them at the limit" if rest else ""
    return f"{table}\n{count:,} replies, {how}{limit}; {result['seconds']:.1f} s"


def shards(manifest: Mapping[str, Any], folder: str | Path) -> str:
    """The manifest of teacher shards."""
    count = max(manifest["num_tokens"], 1)
    return figures(
        {
            "sequences": manifest["num_records"],
            "tokens a sequence": manifest["seq_len"],
            "tokens": manifest["num_tokens"],
            "draws a token": manifest["draws"],
            "unique ids a token": manifest["unique_ids"] / count,
            "bytes a token": manifest["bytes"] / count,
            "bytes": manifest["bytes"],
            "teacher cross-entropy, nats": manifest["teacher_cross_entropy"],
            "teacher entropy, nats": manifest["teacher_entropy"],
            "folder": str(folder),
        }
    )


def run(result: Mapping[str, Any], folder: str | Path) -> str:
    """The result of a training run."""
    metrics = result.get("metrics") or {}
    replies = ""
    if "valid/exact_match" in metrics:
        replies = f", {metrics['valid/exact_match']:.1%} of replies exact"
    return (
        f"{result['name']}: {result['bits_per_byte']:.4f} bits/byte, loss {result['loss']:.4f}, "
        f"accuracy {result['accuracy']:.4f}{replies} on held-out text after "
        f"{result['tokens']:,} tokens ({result['tokens_per_s'] or 0:,.0f} tokens/s); see {folder}"
    )


def replay(seen: Mapping[str, Any]) -> str:
    """A step that was run once more; gradients by part of the model."""
    parts: dict[str, float] = {}
    for path, norm in seen["gradient_norms"].items():
        part = "/".join(path.split("/")[:2])
        parts[part] = math.hypot(parts.get(part, 0.0), norm)
    lines = [
        f"step {seen['step']} of {seen['name']}, from the state of step {seen['from_step']}",
        f"loss {seen['loss']:.6g}   gradient norm {seen['grad_norm']:.6g}",
    ]
    for name in ("sequences", "records"):
        if name in seen:
            lines.append(f"{name} {', '.join(map(str, seen[name]))}")
    width = max(map(len, parts))
    lines += ["", "gradient norm of", *(f"  {part:{width}}  {x:.6g}" for part, x in parts.items())]
    lines += ["", "first that is not finite"]
    lines += [f"  {kind:{width}}  {name or 'none'}" for kind, name in seen["not_finite"].items()]
    return "\n".join(lines)


def cut_off(model: Mapping[str, Any]) -> str:
    """A line for a pattern that is longer than the model, in which letters go unused."""
    pattern, layers = model["attn_pattern"], model["num_layers"]
    if not (unused := pattern[layers:]):
        return ""
    return f"attn_pattern={pattern} is longer than num_layers={layers}: {unused} is cut off\n\n"


def _spell(value: Any) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
