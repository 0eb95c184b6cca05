"""Work that cannot be asked to stop is left behind."""

from __future__ import annotations

import threading
import time

import pytest

from accel_train.interrupt import Interrupted, abandonable


def never() -> bool:
    return False


def test_its_result_and_its_error_are_the_caller_s() -> None:
    assert abandonable(lambda: 3, never) == 3
    assert abandonable(lambda: None, never) is None

    def fails() -> None:
        raise TimeoutError("of the work itself")

    with pytest.raises(TimeoutError, match="of the work itself"):
        abandonable(fails, never)


def test_a_stop_is_answered_while_the_work_goes_on() -> None:
    released, begun = threading.Event(), time.monotonic()
    with pytest.raises(Interrupted):
        abandonable(released.wait, lambda: time.monotonic() > begun + 0.3)
    assert time.monotonic() < begun + 3
    released.set()


def test_what_is_done_counts_although_a_stop_has_come() -> None:
    assert abandonable(lambda: 3, lambda: True) == 3
