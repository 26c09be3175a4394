"""How many FLOPs the matmuls of a traced step take, loops and recomputation counted.

Read from the jaxpr, where every scan says its length. XLA's figure counts the body of a loop once,
and `model.config.flops_per_token` counts what the model needs: no recomputation, and of attention
no more than the window and the causal half.
"""

import math
from typing import Any

import jax


def count_flops(jaxpr: Any) -> int:
    """FLOPs of all devices together. Work that devices repeat, because they cannot split it, counts
    once outside of a `shard_map` and on each of them inside. Other loops than scans turn once."""
    total = 0
    for eqn in jaxpr.eqns:
        inner = sum(count_flops(one) for one in _jaxprs(eqn))
        name = eqn.primitive.name
        if name == "dot_general":
            total += _matmul(eqn)
        elif name == "scan":
            total += inner * eqn.params["length"]
        elif name == "cond":
            total += max(map(count_flops, _jaxprs(eqn)))
        elif name == "shard_map":
            total += inner * eqn.params["mesh"].size
        else:
            total += inner
    return total


def _matmul(eqn: Any) -> int:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    left = eqn.invars[0].aval.shape
    return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)


def _jaxprs(eqn: Any) -> list[Any]:
    leaves = jax.tree.leaves(
        list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
    )
    found = [leaf for leaf in leaves if hasattr(leaf, "eqns") or hasattr(leaf, "jaxpr")]
    return [getattr(leaf, "jaxpr", leaf) for leaf in found]
