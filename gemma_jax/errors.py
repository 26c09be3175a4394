"""The one exception that means "the user can mend this".

The command line prints its message as one sentence and exits with code 2. Every other
exception is a bug of ours and keeps its traceback.
"""

import math
import signal
from typing import Any


class UserError(ValueError):
    """Bad input. The message names the value, the place and the mend."""


class PromptError(UserError):
    """One of several prompts is bad. `number` says which, from 0, and `reason` why."""

    def __init__(self, number: int, reason: str) -> None:
        super().__init__(f"prompt {number + 1}: {reason}")
        self.number, self.reason = number, reason


def require_positive(settings: Any, *names: str, allow_zero: bool = False) -> None:
    """Refuses a setting that is not a positive, finite number; None passes where it is allowed."""
    for name in names:
        value = getattr(settings, name)
        if value is None:
            continue
        if not (math.isfinite(value) and (value > 0 or (allow_zero and value == 0))):
            wanted = "zero or more" if allow_zero else "positive"
            raise UserError(
                f"{type(settings).__name__}.{name}={value} must be {wanted} and finite."
            )


def require_fractions(settings: Any, *names: str, below_one: bool = False) -> None:
    """Refuses a setting that does not lie between 0 and 1."""
    for name in names:
        value = getattr(settings, name)
        if value is None or (0 <= value <= 1 and not (below_one and value == 1)):
            continue
        wanted = "be at least 0 and below 1" if below_one else "lie between 0 and 1"
        raise UserError(f"{type(settings).__name__}.{name}={value} must {wanted}.")


class Interrupted(Exception):  # noqa: N818
    """Work stopped on request (Ctrl-C, SIGTERM), all saved; the message says how to go on."""


class Preempted(Interrupted):
    """It was SIGTERM, as machines say that they are about to be taken away."""


class Terminated(KeyboardInterrupt):
    """SIGTERM where nothing waits for it: like Ctrl-C, nobody who handles errors means this."""


INTERRUPTED_CODE = 130  # as shells say it: the user has stopped it, so nobody starts it again
PREEMPTED_CODE = 75  # EX_TEMPFAIL: the same command, started again, goes on
STOPPED = "stopped; the same command goes on from the last thing saved."


def exit_code(number: int) -> int:
    """Of a process that the signal of this number has stopped."""
    return PREEMPTED_CODE if number == signal.SIGTERM else INTERRUPTED_CODE
