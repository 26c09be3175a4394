"""How every test runs: eight CPU devices, strict dtypes, checked shapes, warnings as errors.

`-m gpu` leaves the devices alone and runs the tests that need an NVIDIA GPU; elsewhere those are
skipped.
"""

import gc

import jax
import jaxtyping
import pytest

from gemma_jax.files import compilation_cache

WARNINGS = ["error"]  # third-party noise that cannot be mended here is let through, with its reason

# The annotations of array functions are checked in every call that a test makes.
jaxtyping.install_import_hook(["gemma_jax.ops", "gemma_jax.model"], "beartype.beartype")


def pytest_configure(config: pytest.Config) -> None:
    for line in WARNINGS:
        config.addinivalue_line("filterwarnings", line)
    if not _wants_gpu(config):
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_compilation_cache_dir", str(compilation_cache()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items or (_wants_gpu(config) and jax.default_backend() == "gpu"):
        return
    for item in gpu_items:
        item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU and `-m gpu`"))


def pytest_collection_finish() -> None:
    """Modules and tests stay: the collector need not look at them again after every few traces."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


def _wants_gpu(config: pytest.Config) -> bool:
    expression = config.option.markexpr
    return "gpu" in expression and "not gpu" not in expression
