"""What a person is shown of a measurement."""

from collections.abc import Sequence
from typing import Any

_HEAD = (
    *("", "what", "batch", "seq_len", "tokens/s", "least", "most", "ms a step", "MFU", "memory"),
    *("compile", "cached"),
)
_TEXT = 2  # columns of text; the others are numbers


def text(result: dict[str, Any]) -> str:
    """A line a row, ours before the peers', then ratios and parts."""
    rows: list[tuple[str, ...]] = [_HEAD]
    for source in (result, *result["peers"]):
        rows += [_line(source["name"], row) for row in source["rows"]]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [f"{result['device']}; {versions}; commit {result['commit'] or 'unknown'}", ""]
    lines += _aligned(rows)
    for peer, ratios in result["ratios"].items():
        found = ", ".join(f"{one['ratio']:.2f} ({_work(one)})" for one in ratios)
        lines.append(f"gemma_jax over {peer}: {found}")
    if result["peers"]:
        lines.append(
            "Peers keep weights and optimizer state in the compute dtype, gemma_jax in float32."
        )
    for row in result["rows"]:
        lines += _details(row)
    if result["rows"][0]["peak_bytes"] is None:
        lines.append("memory is the host's: the device does not tell its own")
    return "\n".join(lines)


def swept(value: dict[str, Any]) -> str:
    """A line a point and library."""
    rows: list[tuple[str, ...]] = [(value["sweep"], *_HEAD)]
    failed = []
    for point in value["points"]:
        if (result := point.get("result")) is None:
            failed.append(f"{value['sweep']}={point['value']}: {point['error']}")
            continue
        for source in (result, *result["peers"]):
            rows += [(str(point["value"]), *_line(source["name"], r)) for r in source["rows"]]
    return "\n".join([*_aligned(rows, text=1 + _TEXT), *failed, f"plot: {value['plot']}"])


def _line(name: str, row: dict[str, Any]) -> tuple[str, ...]:
    rate = row["tokens_per_s"]
    memory = row["peak_bytes"] or row["host_peak_bytes"]
    return (
        *(name, row["what"], str(row["batch"]), str(row["seq_len"])),
        *(f"{rate[key]:,.0f}" for key in ("median", "min", "max")),
        f"{row['seconds']['median'] * 1e3:,.2f}",
        "" if row["mfu"] is None else f"{row['mfu']:.1%}",
        "" if memory is None else f"{memory / 2**30:.2f} GiB",
        *("" if row[k] is None else f"{row[k]:.1f} s" for k in ("compile_s", "compile_cached_s")),
    )


def _details(row: dict[str, Any]) -> list[str]:
    lines = []
    if row["parts"]:
        shares = sorted(row["parts"].items(), key=lambda pair: -pair[1])
        found = ", ".join(f"{part} {share:.1%}" for part, share in shares)
        lines.append(f"{row['what']}, time of kernels: {found}; busy {row['busy']:.2f}")
    elif row["what"] in ("train", "distill"):
        lines.append(f"{row['what']}: this device's profile does not tell the parts apart")
    if row["data_wait"] is not None:
        size = "" if row["program_bytes"] is None else f"{row['program_bytes'] / 2**30:.3f} GiB"
        lines.append(
            f"{row['what']}, waiting for data: {row['data_wait']:.2%} of the time; program "
            f"{size} a device; {row['documents']} document(s) a sequence; loss {row['loss']:.3f}"
        )
    return lines


def _work(one: dict[str, Any]) -> str:
    return f"{one['what']}, batch {one['batch']}"


def _aligned(rows: Sequence[tuple[str, ...]], text: int = _TEXT) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if column < text else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
