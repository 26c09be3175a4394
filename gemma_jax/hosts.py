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

from gemma_jax.errors import Interrupted, Preempted, Terminated, UserError

_LOOK_MS = 1000
_OK, _STOPPED, _TERMINATED = "ok", "stopped", "terminated"
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
        told = _wait_for(client, key)
        if told == _STOPPED:
            raise KeyboardInterrupt
        if told == _TERMINATED:
            raise Terminated
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
    except (Interrupted, KeyboardInterrupt) as stop:
        told = _TERMINATED if isinstance(stop, (Preempted, Terminated)) else _STOPPED
        raise
    finally:
        client.key_value_set(key, told)
    return result


def _wait_for(client: Any, key: str) -> str:
    """A value of JAX's key-value store, as soon as it is there. Between two looks the main thread
    hears of signals."""
    while True:
        try:
            return client.blocking_key_value_get(key, _LOOK_MS)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise


def of_first(values: np.ndarray) -> np.ndarray:
    """What the first process has in `values`, an array of the same shape in each."""
    return values if jax.process_count() == 1 else multihost_utils.broadcast_one_to_all(values)


def any_of(flag: bool) -> bool:
    """Whether it is so in any process; all must call it together."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.array(flag)).any())


def fetch(tree: Any) -> Any:
    """Arrays on the host, whole in every process; all must call it together."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)
