"""Types of TPU slices as Cloud TPU names them: v5litepod-16 is 16 chips of v5e on 4 machines."""

from gemma_jax.errors import UserError

# Generation -> (runtime version, what a chip counts as in the type's number). Cloud TPU
# documentation, "TPU software versions" and the page of each generation.
_GENERATIONS = {
    "v2": ("tpu-ubuntu2204-base", 2),
    "v3": ("tpu-ubuntu2204-base", 2),
    "v4": ("tpu-ubuntu2204-base", 2),
    "v5litepod": ("v2-alpha-tpuv5-lite", 1),
    "v5p": ("v2-alpha-tpuv5", 2),
    "v6e": ("v2-alpha-tpuv6e", 1),
}
_ONE_HOST = 8  # chips of v5e or v6e that one machine may have; larger slices have 4 a machine


def check_accelerator(text: str) -> str:
    """Refuses what is no type, before anything is asked for."""
    generation, _, size = text.partition("-")
    if generation in _GENERATIONS and size.isdecimal() and int(size) > 0:
        chips, rest = divmod(int(size), _GENERATIONS[generation][1])
        if rest or (chips not in (1, 2) and chips % 4):
            raise UserError(
                f"--type {text}: no slice has that many chips; machines have 4 of them, as in "
                f"{generation}-{16 * _GENERATIONS[generation][1]}."
            )
        return text
    if generation in ("v5e", "v5lite"):
        raise UserError(f"--type {text}: Cloud TPU calls it v5litepod-{size or 16}.")
    known = ", ".join(f"{name}-N" for name in _GENERATIONS)
    raise UserError(f"--type {text} is no type of TPU slice that is known; there are {known}.")


def runtime_version(accelerator: str) -> str:
    """The image of its machines that is meant for JAX."""
    return _GENERATIONS[accelerator.split("-")[0]][0]


def count_workers(accelerator: str) -> int:
    """Machines of a slice."""
    generation, _, size = accelerator.partition("-")
    per_chip = _GENERATIONS[generation][1]
    chips = max(1, int(size) // per_chip)
    return 1 if per_chip == 1 and chips <= _ONE_HOST else -(-chips // 4)
