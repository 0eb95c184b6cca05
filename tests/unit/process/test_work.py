"""Work that cannot be asked to stop is left behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from accel_train.errors import Interrupted
from accel_train.process.work import abandonable


def never() -> bool:
    return False


def test_its_result_and_its_error_are_the_caller_s() -> None:
    assert abandonable(lambda _: 3, never) == 3
    assert abandonable(lambda _: None, never) is None

    def fails(_: object) -> None:
        raise TimeoutError("of the work itself")

    with pytest.raises(TimeoutError, match="of the work itself"):
        abandonable(fails, never)


def test_a_stop_is_answered_while_the_work_goes_on_and_the_work_is_told() -> None:
    begun, asked, told = time.monotonic(), set(), threading.Event()

    def work(is_abandoned: Callable[[], bool]) -> None:
        while not is_abandoned():
            time.sleep(0.01)
        told.set()

    def should_stop() -> bool:
        asked.add(threading.current_thread())
        return time.monotonic() > begun + 0.3

    with pytest.raises(Interrupted):
        abandonable(work, should_stop)
    assert time.monotonic() < begun + 3
    assert told.wait(5)
    assert asked == {threading.current_thread()}, "what it asks need not be safe for threads"


def test_work_that_never_looks_is_left_behind() -> None:
    released, answers = threading.Event(), iter([False, False])
    with pytest.raises(Interrupted):
        abandonable(lambda _: released.wait(), lambda: next(answers, True))
    released.set()


def test_nothing_is_begun_after_a_stop() -> None:
    with pytest.raises(Interrupted):
        abandonable(lambda _: pytest.fail("begun"), lambda: True)
