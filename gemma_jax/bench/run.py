"""One measurement from its description: peers first, then ours, and how they compare."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from gemma_jax.bench import peers, running, training
from gemma_jax.bench.config import BenchConfig, What
from gemma_jax.bench.timing import Row, environment
from gemma_jax.claims import commit
from gemma_jax.errors import UserError
from gemma_jax.model.config import flops_per_token
from gemma_jax.settings import to_json

_KINDS: dict[What, Callable[[BenchConfig], list[Row]]] = {
    "train": training.train,
    "distill": training.train,
    "teacher": running.teacher,
    "decode": running.decode,
    "data": running.data,
}


def bench(
    configs: Sequence[BenchConfig], *, against: Sequence[str] = (), peer_python: str | None = None
) -> dict[str, Any]:
    """Measures each of `configs` (several batch sizes of one model, say), and the peers named in
    `against` on the same work.

    Returns {"name", "device", "versions", "commit", "model", "rows", "peers", "ratios"}: `rows`
    have the keys of `timing.ROW_KEYS`; each of `peers` is what a script of benchmarks/ prints, and
    `ratios` holds by peer our tokens/s a device over its own, row by row.
    """
    for config in configs:
        peers.check(config, against)
    # A peer needs the accelerator's memory, and JAX takes most of it as soon as it looks at it.
    found = [peers.run(name, config, peer_python) for name in against for config in configs]
    rows = [row for config in configs for row in _measured(config)]
    others = _merged(found)
    for other in others:
        _fill_utilisation(other, configs[0])
    return {
        "name": "gemma_jax",
        **environment(),
        "commit": commit(),
        "model": to_json(configs[0].model),
        "rows": rows,
        "peers": others,
        "ratios": {other["name"]: _ratios(rows, other["rows"]) for other in others},
    }


def _measured(config: BenchConfig) -> list[Row]:
    try:
        return _KINDS[config.what](config)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            f"bench {config.what} with --batch {config.batch} --seq-len {config.seq_len} does not "
            "fit into the device's memory; make one of them smaller, or give --remat full or "
            "--microbatches."
        ) from error


def _merged(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The results of one peer as one, its rows in order."""
    by_name: dict[str, dict[str, Any]] = {}
    for one in found:
        known = by_name.setdefault(one["name"], one | {"rows": []})
        known["rows"] = known["rows"] + one["rows"]
    return list(by_name.values())


def _fill_utilisation(other: dict[str, Any], config: BenchConfig) -> None:
    """A peer's MFU by our own formula: the same work, on one of our devices."""
    if config.what == "train":
        flops = flops_per_token(config.model, config.seq_len)
        for row in other["rows"]:
            row["mfu"] = training.utilisation(row, flops, jax.devices()[:1])


def _ratios(rows: list[Row], others: list[Row]) -> list[dict[str, Any]]:
    pairs = [(a, b) for a in rows for b in others if _same_work(a, b)]
    devices = {"train": len(jax.devices())}  # peers and generation use one
    return [
        {
            "what": a["what"],
            "batch": a["batch"],
            "ratio": a["tokens_per_s"]["median"]
            / devices.get(a["what"], 1)
            / b["tokens_per_s"]["median"],
        }
        for a, b in pairs
    ]


def _same_work(a: Row, b: Row) -> bool:
    return all(a[key] == b[key] for key in ("what", "batch", "seq_len"))
