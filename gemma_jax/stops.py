"""Requests to stop, by Ctrl-C or SIGTERM: one that reaches any process stops all of them alike.

A loop stops between the same two steps everywhere; what is outside of a loop stops at once, since
all of it can be begun again. Processes tell each other through the key-value store of JAX's
coordination service, from a thread, so that a step costs a lock that nobody holds. JAX has a
service of its own for this, which is switched off: it keeps SIGTERM from everything but a loop,
looks for it once a second, and knows no Ctrl-C.
"""

import atexit
import contextlib
import functools
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax._src import distributed  # the client has no public name

from gemma_jax.errors import STOPPED, Interrupted, Preempted, exit_code

_NOTICE, _PLACES = "gemma_jax/stop/notice", "gemma_jax/stop/place"
_LOOK_EVERY_S = 0.5
_ANSWER_MS = 60_000  # a process that does not answer is no longer there
_LEAVE_S = 15.0  # for a main thread that waits for another process, and will never hear of a signal
_SIGNALS = (signal.SIGINT, signal.SIGTERM)

type _Place = tuple[int, int]  # (number of the loop in this process, steps it has done)


def stopped(number: int, message: str = STOPPED) -> Interrupted:
    """What a signal of this number raises."""
    return (Preempted if number == signal.SIGTERM else Interrupted)(message)


def listen() -> None:
    """Obeys the notices of other processes from now on; they must have been joined."""
    _Agreement.of_all()


def noticed() -> int:
    """The signal that has reached one of several processes; 0: none has, or there is but one."""
    return _Agreement.of_all().number if jax.distributed.is_initialized() else 0


def tell(number: int) -> None:
    """Hands a signal on to all processes, where there are several; returns at once."""
    if jax.distributed.is_initialized():
        agreement = _Agreement.of_all()
        threading.Thread(target=agreement.tell, args=(number,), daemon=True).start()


def part(number: int) -> None:
    """Hands a signal on and takes leave of the others, for a process that ends at once."""
    if jax.distributed.is_initialized():
        _Agreement.of_all().tell(number)
        _Agreement.of_all().part()


@contextlib.contextmanager
def requests(start: int) -> Iterator[Callable[[int], int]]:
    """Within a loop that has done `start` steps, yields `asked(step)`.

    All processes call it after every step. It gives the number of a signal, in all of them after
    the same step, or 0. A second signal acts as it does outside.
    """
    if jax.process_count() > 1:
        with _handlers(tell), _Agreement.of_all().loop(start) as asked:
            yield asked
        return
    received: list[int] = []
    with _handlers(received.append):
        yield lambda step: received[0] if received else 0


@contextlib.contextmanager
def _handlers(receive: Callable[[int], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}

    def request(number: int, frame: Any) -> None:
        signal.signal(number, before[signal.Signals(number)])
        receive(number)

    for number in before:
        signal.signal(number, request)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Agreement:
    """What several processes know of a stop. A thread looks for a notice; it tells the others how
    far this process has come, and holds the loop until it knows how far they have."""

    @staticmethod
    @functools.cache
    def of_all() -> "_Agreement":
        return _Agreement()

    def __init__(self) -> None:
        self.number = 0
        self._told = False  # by this process itself
        self._client: Any = distributed.global_state.client
        self._lock = threading.Lock()
        self._loops = 0
        self._passed: _Place | None = None  # None outside of loops
        self._last: _Place | None = None  # the place after which all stop
        self._lost = False  # another process is outside of loops: none can save alone
        self._wake, self._closed = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        atexit.register(self.close)  # before JAX's own, which takes the client away

    def tell(self, number: int) -> None:
        self._told = True
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # there is a notice already
            self._client.key_value_set(_NOTICE, str(int(number)))
        self._wake.set()

    def close(self) -> None:
        self._closed.set()
        self._wake.set()
        self._thread.join(timeout=5)

    @contextlib.contextmanager
    def loop(self, start: int) -> Iterator[Callable[[int], int]]:
        with self._lock:
            if self.number:
                raise stopped(self.number)
            self._loops += 1
            self._passed = (self._loops, start)
        try:
            yield self._asked
        finally:
            with self._lock:
                self._passed = None
        if self.number:  # agreed on a step that the loop has not
            raise stopped(self.number)

    def _asked(self, step: int) -> int:
        with self._lock:
            self._passed = (self._loops, step)
            if self._lost:
                raise stopped(self.number)
            return self.number if self._last and self._passed >= self._last else 0

    def _watch(self) -> None:
        while not self._closed.is_set():
            self._wake.wait(_LOOK_EVERY_S)
            self._wake.clear()
            try:
                number = int(self._client.key_value_try_get(_NOTICE))
            except jax.errors.JaxRuntimeError:  # none yet, or no others any more
                continue
            with self._lock:
                outside = not self._meet(number)
            if outside and not self._closed.is_set():
                self._leave(number)
            return

    def _meet(self, number: int) -> bool:
        """Notes after which step all stop; False outside of loops."""
        self.number = number
        own, count = jax.process_index(), jax.process_count()
        told = "" if self._passed is None else "{} {}".format(*self._passed)
        self._client.key_value_set(f"{_PLACES}/{own}", told)
        if self._passed is None:
            return False
        try:
            keys = [f"{_PLACES}/{process}" for process in range(count)]
            places = [self._client.blocking_key_value_get(key, _ANSWER_MS) for key in keys]
        except jax.errors.JaxRuntimeError:
            places = [""]
        self._lost = not all(places)
        if not self._lost:
            loop, step = max((int(a), int(b)) for a, b in map(str.split, places))
            self._last = (loop, step + 1)
        return True

    def _leave(self, number: int) -> None:
        """Hands the notice to the main thread, which may know of it already or be at its end."""
        if not self._told and callable(signal.getsignal(number)):
            os.kill(os.getpid(), number)
        if not self._closed.wait(_LEAVE_S):
            os.write(2, f"\n{STOPPED}\n".encode())
            self.part()
            os._exit(exit_code(number))

    def part(self) -> None:
        """JAX ends with an error all processes that one has left without a word."""
        with contextlib.suppress(Exception):
            self._client.shutdown()
