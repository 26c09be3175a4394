"""Several processes that run one program: what one of them does for all, and what all must know.

They are expected to see the same files.
"""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

from gemma_jax.errors import UserError

_WAIT_MS = 7 * 24 * 3600 * 1000  # a corpus may take days; a process that dies ends the wait
_OK = "ok"
_turns = itertools.count()


def is_first() -> bool:
    """Whether this process is the one that writes what is written once."""
    return jax.process_index() == 0


def first_alone[T](work: Callable[[], T]) -> T:
    """What `work` returns; the first process does it while the others wait, and they after it.

    For work that leaves files behind and finds them again. Where it is refused to the first, all
    are refused with the same sentence.
    """
    if jax.process_count() == 1:
        return work()
    if not jax.distributed.is_initialized():
        raise UserError(
            f"this is one of {jax.process_count()} processes, and they were not joined; add "
            "--distributed, or call jax.distributed.initialize() first."
        )
    client = multihost.get_jax_distributed_client()
    key = f"gemma_jax/first_alone/{next(_turns)}"
    if not is_first():
        told = client.blocking_key_value_get(key, _WAIT_MS)
        if told != _OK:
            raise UserError(told)
        return work()
    told = "the first process has failed; see its message."
    try:
        result = work()
        told = _OK
    except UserError as error:
        told = str(error)
        raise
    finally:
        client.key_value_set(key, told)
    return result


def of_first(values: np.ndarray) -> np.ndarray:
    """What the first process has in `values`, an array of the same shape in each."""
    return values if jax.process_count() == 1 else multihost_utils.broadcast_one_to_all(values)


def fetch(tree: Any) -> Any:
    """Arrays on the host, whole in every process; all must call it together."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)
