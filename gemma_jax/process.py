"""The process behind a command: what its libraries may print, where it caches compiled programs,
and how it stops."""

import contextlib
import importlib
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from gemma_jax.errors import STOPPED, Terminated, UserError, exit_code
from gemma_jax.files import compilation_cache
from gemma_jax.progress import silence


def quiet_threads() -> None:
    """Threads of TensorBoard, Orbax and TensorStore print tracebacks after a disk error or a
    damaged file that the main thread puts into a sentence; these alone are dropped."""

    def in_thread(failure: threading.ExceptHookArgs) -> None:
        if not _of_disk(failure.exc_value):
            threading.__excepthook__(failure)

    def in_callback(failure: Any) -> None:
        # The first array that cannot be read ends Orbax's event loop; TensorStore and the readers
        # that were waiting tell of the others afterwards.
        code = getattr(failure.object, "cr_code", None)
        waiting = code is not None and "orbax" in code.co_filename
        closed = waiting or str(failure.exc_value) == "Event loop is closed"
        if not closed and not _of_disk(failure.exc_value):
            sys.__unraisablehook__(failure)

    threading.excepthook, sys.unraisablehook = in_thread, in_callback
    logging.getLogger("absl").addFilter(
        lambda record: not (record.exc_info and _of_disk(record.exc_info[1]))
    )


def _of_disk(error: BaseException | None) -> bool:
    """Whether it comes from the operating system; TensorStore hands that on in a text alone."""
    return isinstance(error, OSError) or "os_error_code=" in str(error)


@contextlib.contextmanager
def stop_by_exception() -> Iterator[None]:
    """Ctrl-C and SIGTERM raise KeyboardInterrupt and `Terminated`; of several processes, in all."""

    def stop(number: int, frame: Any) -> None:
        if (stops := _stops()) is not None:
            stops.tell(number)
        raise Terminated if number == signal.SIGTERM else KeyboardInterrupt

    with _handlers(stop):
        yield


def import_uninterrupted(module: str) -> None:
    """Imports what a verb needs. Ctrl-C inside of a C++ extension's import would abort the process
    with a core dump; nothing is begun yet, so the process ends at once instead."""

    def stop(number: int, frame: Any) -> None:
        os.write(2, f"\n{STOPPED}\n".encode())
        if (stops := _stops()) is not None:
            stops.part(number)
        os._exit(exit_code(number))

    with _handlers(stop):
        importlib.import_module(module)


def _stops() -> Any:
    """The module, where jax is there and processes may have been joined."""
    return sys.modules.get("gemma_jax.stops")


@contextlib.contextmanager
def _handlers(handler: Callable[[int, Any], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {n: signal.signal(n, handler) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def use_compilation_cache() -> None:
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(compilation_cache()))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")


def join_processes(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Joins others that run the same command, before anything asks for devices.

    `coordinator` is HOST:PORT of the first process. What is not given is found out from SLURM,
    Cloud TPU, GKE or MPI by JAX, or from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID. The first process alone prints results and progress.
    """
    import jax

    from gemma_jax import stops

    given = {"JAX_NUM_PROCESSES": num_processes, "JAX_PROCESS_ID": process_id}
    count, own = (_whole(name, value) for name, value in given.items())
    jax.config.update("jax_enable_preemption_service", False)  # see `stops`
    try:
        jax.distributed.initialize(coordinator, count, own, _own_gpus())
    except (ValueError, RuntimeError) as error:
        cause = str(error).splitlines()[0].rstrip(".")
        raise UserError(
            f"the processes did not find each other ({cause}); give each --coordinator HOST:PORT, "
            "--num-processes and its own --process-id, or start one process alone."
        ) from error
    stops.listen()
    # Libraries in C++ tell of their connections on stdout, which holds results alone.
    results = os.dup(1)
    os.dup2(2, 1)
    if jax.process_index() > 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), results)
        silence()
    sys.stdout = os.fdopen(results, "w")


def _own_gpus() -> list[int] | None:
    """All GPUs of a node where SLURM has started one process on each: JAX expects a process a GPU,
    and would take the first one alone. None elsewhere: JAX knows."""
    names = ("SLURM_NTASKS", "SLURM_STEP_NUM_NODES", "SLURM_GPUS_ON_NODE")
    tasks, nodes, gpus = map(os.environ.get, names)
    if "JAX_LOCAL_DEVICE_IDS" in os.environ or tasks is None or tasks != nodes or not gpus:
        return None
    return list(range(int(gpus)))


def _whole(name: str, value: int | None) -> int | None:
    text = os.environ.get(name)
    if value is not None or not text:
        return value
    try:
        return int(text)
    except ValueError:
        raise UserError(f"{name}={text} must be a whole number.") from None


def quiet_libraries() -> None:
    """Keeps what libraries tell their own developers off stderr; their errors stay."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    for name in ("absl", "asyncio", "gcsfs", "huggingface_hub", "jax", "orbax"):
        logging.getLogger(name).setLevel(logging.CRITICAL if name == "asyncio" else logging.ERROR)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
