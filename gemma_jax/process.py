"""The process behind a command: what its libraries may print, where it caches compiled programs,
and how it stops."""

import importlib
import logging
import os
import signal
import sys
import threading
import warnings
from typing import Any

from gemma_jax.files import compilation_cache

STOPPED = "\nstopped; the same command goes on from the last thing saved."


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


def import_uninterrupted(module: str) -> None:
    """Imports what a verb needs. Ctrl-C inside of a C++ extension's import would abort the process
    with a core dump; nothing is begun yet, so the process ends at once instead."""
    if threading.current_thread() is not threading.main_thread():
        return

    def stop(*_: Any) -> None:
        os.write(2, f"{STOPPED}\n".encode())
        os._exit(130)

    before = signal.signal(signal.SIGINT, stop)
    try:
        importlib.import_module(module)
    finally:
        signal.signal(signal.SIGINT, before)


def use_compilation_cache() -> None:
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(compilation_cache()))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")


def quiet_libraries() -> None:
    """Keeps what libraries tell their own developers off stderr; their errors stay."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    for name in ("absl", "asyncio", "huggingface_hub", "jax", "orbax"):
        logging.getLogger(name).setLevel(logging.CRITICAL if name == "asyncio" else logging.ERROR)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
