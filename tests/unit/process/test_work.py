"""What long work needs from outside: to speak, to stop, to wait, and to be left behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from accel_train.errors import Interrupted
from accel_train.process import work as module
from accel_train.process.work import SILENT, WorkContext, abandonable, never


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds, which pass in sleep alone."""
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(module.time, "sleep", sleep)
    return now


def test_silent_work_runs_to_its_end() -> None:
    SILENT.say("phase", "what")
    SILENT.reached("point")
    SILENT.check()
    assert not SILENT.should_stop()


def test_check_raises_once_the_work_is_to_stop() -> None:
    answers = iter([False, True])
    work = WorkContext(should_stop=lambda: next(answers))
    work.check()
    with pytest.raises(Interrupted):
        work.check()


def test_saying_names_its_phase() -> None:
    said: list[tuple[str, str]] = []
    WorkContext(say=lambda phase, what: said.append((phase, what))).saying("lock")("waiting")
    assert said == [("lock", "waiting")]


def test_wait_for_reports_at_once_and_every_five_seconds(clock: list[float]) -> None:
    lines: list[tuple[str, str]] = []
    work = WorkContext(say=lambda phase, what: lines.append((phase, what)))
    assert work.wait_for("lock", lambda: clock[0] >= 11, 60, lambda: "waiting for the tide")
    assert lines == [("lock", f"waiting for the tide, at most {seconds} s more") for seconds in (60, 55, 50)]


def test_wait_for_gives_up_after_its_timeout(clock: list[float]) -> None:
    assert not SILENT.wait_for("lock", lambda: False, 3, lambda: "waiting")
    assert 3 <= clock[0] < 3.2


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("succeeds", [False, True])
def test_wait_for_without_a_timeout_tries_once(succeeds: bool) -> None:
    tries: list[bool] = []

    def attempt() -> bool:
        tries.append(succeeds)
        return succeeds

    work = WorkContext(say=lambda *_: pytest.fail("there is nothing to wait for"))
    assert work.wait_for("lock", attempt, 0, lambda: "waiting") == succeeds
    assert tries == [succeeds]


def test_wait_for_says_what_it_was_stopped_in(clock: list[float]) -> None:
    work = WorkContext(should_stop=lambda: clock[0] > 1)
    with pytest.raises(Interrupted, match="stopped while waiting for the tide"):
        work.wait_for("lock", lambda: False, 60, lambda: "waiting for the tide")
    assert clock[0] < 2


def test_abandonable_work_returns_its_result_or_raises_its_error() -> None:
    assert abandonable(lambda _: 3, never) == 3
    assert abandonable(lambda _: None, never) is None

    def fails(_: object) -> None:
        raise TimeoutError("of the work itself")

    with pytest.raises(TimeoutError, match="of the work itself"):
        abandonable(fails, never)


def test_abandoned_work_is_told_and_its_caller_goes_on() -> None:
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


def test_abandoned_work_that_never_looks_is_left_behind() -> None:
    released, answers = threading.Event(), iter([False, False])
    with pytest.raises(Interrupted):
        abandonable(lambda _: released.wait(), lambda: next(answers, True))
    released.set()


def test_abandonable_work_never_begins_after_a_stop() -> None:
    with pytest.raises(Interrupted):
        abandonable(lambda _: pytest.fail("begun"), lambda: True)
