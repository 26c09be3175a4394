"""What the program is compiled for, as far as the choice of a kernel depends on it."""

from typing import Any

import jax

from gemma_jax.sharding import current_layout


def on_gpu() -> bool:
    return getattr(_device(), "platform", None) == "gpu"


def on_tpu() -> bool:
    return getattr(_device(), "platform", None) == "tpu"


def on_hopper() -> bool:
    return getattr(_device(), "compute_capability", None) == "9.0"


def _device() -> Any:
    """One of the active layout, or else the default one."""
    layout = current_layout()
    if layout is not None:
        return layout.mesh.devices.flat[0]
    return jax.config.jax_default_device or jax.devices()[0]
