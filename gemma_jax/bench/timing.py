"""How time, memory and compilation are measured, and the record that a measurement becomes."""

import contextlib
import importlib.metadata
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from gemma_jax.bench.config import BenchConfig
from gemma_jax.progress import progress

# What every row has, ours and those of peers (benchmarks/common.py); None: not measured.
ROW_KEYS = (
    *("what", "batch", "seq_len", "documents", "compute_dtype", "weights_dtype", "steps"),
    *("repeats", "seconds", "tokens_per_s", "mfu", "loss", "data_wait", "peak_bytes"),
    *("program_bytes", "host_peak_bytes", "compile_s", "compile_cached_s", "parts", "busy"),
)

type Row = dict[str, Any]

# Without options a lowered program keeps what was compiled; this one is what it is by default.
_COMPILE_ANEW: dict[str, Any] = {"xla_embed_ir_in_executable": False}


def make_row(
    config: BenchConfig, times: Sequence[float], tokens: int, *, what: str = "", **known: Any
) -> Row:
    """A row of `times`, seconds of each repeat, in each of which `tokens` were dealt with."""
    row: Row = dict.fromkeys(ROW_KEYS)
    row |= {
        "what": what or config.what,
        "batch": config.batch,
        "seq_len": config.seq_len,
        # None: they are those of real data, and nobody has counted.
        "documents": None if config.data or config.shards else config.documents,
        "compute_dtype": config.model.compute_dtype,
        "weights_dtype": "float32",
        "steps": config.steps,
        "repeats": config.repeats,
        "seconds": spread([seconds / config.steps for seconds in times]),
        "tokens_per_s": spread([tokens / seconds for seconds in times]),
        "peak_bytes": device_peak(),
        "host_peak_bytes": host_peak(),
    }
    if unknown := known.keys() - row.keys():
        raise ValueError(f"rows have no {unknown}")
    return row | known


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def repeated(run: Callable[[], Any], config: BenchConfig, label: str = "") -> list[float]:
    """Seconds of each repeat of `run`, which returns when its work is done."""
    times = []
    with progress(f"bench {label or config.what}", config.repeats) as advance:
        for _ in range(config.repeats):
            times.append(timed(run)[0])
            advance(1)
    return times


def timed[T](run: Callable[[], T]) -> tuple[float, T]:
    began = time.perf_counter()
    value = run()
    return time.perf_counter() - began, value


@contextlib.contextmanager
def empty_cache() -> Iterator[None]:
    """An empty compilation cache of this block's own, whatever was compiled before."""
    settings: dict[str, Any] = {
        "jax_compilation_cache_dir": None,
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    with tempfile.TemporaryDirectory() as folder:
        settings["jax_compilation_cache_dir"] = folder
        try:
            _configure(settings)
            yield
        finally:
            _configure(before)


def _configure(settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # it looks at its folder once
    jax.clear_caches()


def compile_times(lower: Callable[[], Any]) -> tuple[float, float, Any]:
    """(seconds cold, seconds from the persistent cache, the compiled program) of a program that
    `lower` traces; both include tracing, as a new process must do it. Inside `empty_cache`.

    It is traced once: Mosaic numbers the kernels of a process, and a second trace would be another
    program to the cache.
    """
    tracing, lowered = timed(lower)
    cold, program = timed(lambda: lowered.compile(_COMPILE_ANEW))
    jax.clear_caches()
    cached, _ = timed(lambda: lowered.compile(_COMPILE_ANEW))
    return tracing + cold, tracing + cached, program


def program_bytes(program: Any) -> int | None:
    """What a compiled program needs on each device: arguments, results and temporaries at once,
    counted once where a result takes its argument's place."""
    found = program.memory_analysis()
    if found is None:
        return None
    return (
        found.argument_size_in_bytes
        + found.output_size_in_bytes
        + found.temp_size_in_bytes
        - found.alias_size_in_bytes
    )


def device_peak() -> int | None:
    """The most that the process has held on any device so far; None where devices do not tell."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.devices()]
    return max((peak for peak in peaks if peak is not None), default=None)


def host_peak() -> int:
    """The most host memory that the process has held so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def environment() -> dict[str, Any]:
    """Where it was measured."""
    device = jax.devices()[0]
    names = ("jax", "jaxlib", "flax", "optax", "numpy")
    return {
        "device": f"{len(jax.devices())} x {device.device_kind}",
        "versions": {name: importlib.metadata.version(name) for name in names},
    }
