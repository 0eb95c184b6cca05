"""The one exception by which interruptible work says that it was told to stop, and how to leave work that is not.

Lower floors know nothing of signals: they poll a ``should_stop`` callable and raise this,
and whoever passed the callable decides what follows. It is an exception rather than a return
value so that half-made results cannot be mistaken for results.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

_T = TypeVar("_T")
_POLL_SECONDS = 0.1


class Interrupted(Exception):
    """Work was abandoned because ``should_stop()`` turned true."""


def abandonable(work: Callable[[Callable[[], bool]], _T], should_stop: Callable[[], bool]) -> _T:
    """``work(is_abandoned)``, for what cannot always be asked to stop: a library's call, a silent server.

    It runs in a thread of its own. Told to stop, the caller goes on at once and the thread is left behind,
    to end when it next looks at ``is_abandoned()`` or with the process: what it writes must be nobody
    else's. ``should_stop`` is asked in the caller's thread alone.

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
