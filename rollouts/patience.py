"""An environment that hangs while it is built: waited for so long, and no longer."""

from __future__ import annotations

import math
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from pvrpipe.schemas.errors import InvalidValueError, SimulationError

VARIABLE = "PVRPIPE_BUILD_SECONDS"
USUAL = 600.0  # seconds; what is downloaded or compiled on the first use takes minutes


class _LateError(BaseException):
    """Not an ``Exception``: simulators catch those, and try again."""


@contextmanager
def not_for_ever(name: str) -> Iterator[None]:
    """End what takes longer than ``PVRPIPE_BUILD_SECONDS`` (600).

    Only a process's main thread can be interrupted; in another one, nothing is.

    Raises:
        SimulationError: it did.
    """
    seconds = _seconds()
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def late(_: int, __: FrameType | None) -> None:
        raise _LateError

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except _LateError as error:
        raise SimulationError(
            f"{name} was not built within {seconds:g} seconds; find out what it waits for, or give it more: "
            f"{VARIABLE}={2 * seconds:g}"
        ) from error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _seconds() -> float:
    told = os.environ.get(VARIABLE, "")
    try:
        seconds = float(told) if told else USUAL
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < 1e6:
        raise InvalidValueError(f"{VARIABLE} is '{told}'; give seconds above 0, e.g. {USUAL:g}")
    return seconds
