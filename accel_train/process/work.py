"""What long work needs from outside: a way to speak, to hear that it is to stop, and to tell where it is.

Lower layers know nothing of signals, terminals or injected faults: they take one :class:`WorkContext`,
poll it, and raise :class:`~accel_train.errors.Interrupted` when they are told to stop.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import TypeVar

from accel_train.errors import Interrupted

_T = TypeVar("_T")
_POLL_SECONDS = 0.1
_REPORT_SECONDS = 5.0

Say = Callable[[str, str], None]
"""``say(phase, what)``: one line of progress for people."""
StopCheck = Callable[[], bool]
"""``should_stop()``: whether the work is to be abandoned."""


def be_silent(_phase: str, _what: str) -> None:
    """Say nothing."""


def never() -> bool:
    """Never stop."""
    return False


def pass_by(_point: str) -> None:
    """Let no fault fall."""


@dataclass(frozen=True)
class WorkContext:
    """How long work speaks with whoever started it; by default it is silent and runs to its end."""

    say: Say = be_silent
    """Receives lines of progress."""
    should_stop: StopCheck = never
    """Polled now and then."""
    reached: Callable[[str], None] = pass_by
    """Hears of every fault point (see :mod:`accel_train.process.fault_points`), in the thread that reached it."""

    def check(self) -> None:
        """Raise :class:`Interrupted` when the work is to stop."""
        if self.should_stop():
            raise Interrupted

    def saying(self, phase: str) -> Callable[[str], None]:
        """``say`` for one phase."""
        return lambda what: self.say(phase, what)

    def wait_for(self, phase: str, attempt: Callable[[], bool], timeout: float, describe: Callable[[], str]) -> bool:
        """Repeat ``attempt`` until it succeeds (True) or ``timeout`` seconds are over (False).

        What is waited for is said at once and then every few seconds.

        Args:
            phase: under which that is said.
            attempt: tried once at least.
            timeout: seconds.
            describe: what is waited for, as a line for people.

        Raises:
            Interrupted: the work is to stop.
        """
        start = time.monotonic()
        reported = -math.inf
        while not attempt():
            now = time.monotonic()
            if self.should_stop():
                raise Interrupted(f"stopped while {describe()}")
            if now - start >= timeout:
                return False
            if now - reported >= _REPORT_SECONDS:
                reported = now
                self.say(phase, f"{describe()}, at most {max(0.0, timeout - (now - start)):.0f} s more")
            time.sleep(_POLL_SECONDS)
        return True


SILENT = WorkContext()


def abandonable(work: Callable[[StopCheck], _T], should_stop: StopCheck) -> _T:
    """Run ``work(is_abandoned)`` in a thread, for what cannot always be asked to stop: a library's call, a server.

    Told to stop, the caller goes on at once and the thread is left behind, to end when it next looks at
    ``is_abandoned()`` or with the process: what it writes must be nobody else's. ``should_stop`` is asked in
    the caller's thread alone.

    Raises:
        Interrupted: ``should_stop()`` turned true.
        BaseException: whatever ``work`` raises.
    """
    if should_stop():
        raise Interrupted
    abandoned = threading.Event()
    future: Future[_T] = Future()

    def run() -> None:
        try:
            future.set_result(work(abandoned.is_set))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    while not wait([future], timeout=_POLL_SECONDS).done:
        if should_stop():
            abandoned.set()
            raise Interrupted
    return future.result()
