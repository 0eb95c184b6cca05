"""Progress of long work, on a terminal and in a log file."""

from __future__ import annotations

import pytest

from accel_train.process import console as module
from accel_train.process.console import Meter


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_without_a_terminal_a_line_comes_every_five_seconds(clock: list[float]) -> None:
    said: list[str] = []
    with Meter("text read", 200_000_000, said.append, bar=False) as meter:
        for _ in range(20):
            clock[0] += 1
            meter(10_000_000)
    assert said == [f"text read: {share} % of 200MB" for share in (25, 50, 75, 100)]


def test_what_is_fetched_again_is_not_counted_twice_and_the_total_may_come_late(clock: list[float]) -> None:
    said: list[str] = []
    with Meter("download", None, said.append, bar=False) as meter:
        meter.reach(5_000_000)
        meter.reach(0)
        clock[0] += 5
        meter.reach(3_000_000)
        clock[0] += 5
        meter.reach(6_000_000, 12_000_000)
    assert said == ["download: 3.00MB", "download: 50 % of 12.0MB"]


def test_on_a_terminal_there_is_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    with Meter("text read", 100, lambda _: pytest.fail("no lines beside a bar"), bar=True) as meter:
        meter(40)
        meter.reach(50, 200)
        assert meter._bar is not None
        assert (meter._bar.n, meter._bar.total) == (50, 200)
    assert "text read" in capsys.readouterr().err
