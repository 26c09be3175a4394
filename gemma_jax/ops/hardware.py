"""What the program is compiled for, as far as the choice of a kernel depends on it."""

import jax

from gemma_jax.sharding import current_layout


def on_hopper() -> bool:
    """Whether the devices of the active layout, or else the default one, are Hopper GPUs."""
    layout = current_layout()
    if layout is not None:
        device = layout.mesh.devices.flat[0]
    else:
        device = jax.config.jax_default_device or jax.devices()[0]
    return getattr(device, "compute_capability", None) == "9.0"
