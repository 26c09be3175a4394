"""What a compiled program holds on each chip: the figures of its buffer assignment.

`total_allocation_bytes` is all that the program allocates in the chip's memory, arguments with
their padding included, and the compiler refuses programs by their temporaries alone: what it
accepts may still not fit beside its arguments. `temp_size_in_bytes` is no part of that sum: on TPUs
it can be more than what is allocated beyond the arguments.
"""

import math
from typing import Any, NamedTuple

import jax


class Memory(NamedTuple):
    """Bytes on each chip. `parts` are those of the arguments, by what they are, as arrays; the rest
    of `arguments` is padding."""

    parts: dict[str, int]
    arguments: int
    temporary: int
    program: int

    @property
    def padding(self) -> int:
        return self.arguments - sum(self.parts.values())

    @property
    def total(self) -> int:
        return self.arguments + self.temporary + self.program


def part_bytes(parts: dict[str, Any]) -> dict[str, int]:
    """Bytes of each tree of shapes on one chip."""
    return {name: sum(map(_own_bytes, jax.tree.leaves(tree))) for name, tree in parts.items()}


def _own_bytes(leaf: Any) -> int:
    shape = leaf.sharding.shard_shape(leaf.shape)
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct((), leaf.dtype))
        shape = (*shape, *leaf.shape)
    return math.prod(shape) * leaf.dtype.itemsize


def memory_of(compiled: Any, parts: dict[str, Any]) -> Memory:
    """Of a compiled program that takes these `parts`; arguments that it does not read have no
    memory."""
    found = compiled.memory_analysis()
    arguments = found.argument_size_in_bytes
    total = found.total_allocation_bytes
    if not total:  # as on CPUs
        total = arguments + found.output_size_in_bytes + found.temp_size_in_bytes
        total -= found.alias_size_in_bytes
    return Memory(
        part_bytes(parts), arguments, total - arguments, found.generated_code_size_in_bytes
    )
