"""Seconds by phase, each second counted once."""

from __future__ import annotations

import pytest

from accel_train.process import stopwatch as module
from accel_train.process.stopwatch import Rate, Stopwatch


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    return now


def test_nested_phases_count_for_themselves_only(clock: list[float]) -> None:
    watch = Stopwatch()
    with watch.timed("training"):
        clock[0] = 1.0
        with watch.timed("evaluation"):
            clock[0] = 4.0
        clock[0] = 10.0
    assert watch.seconds == {"evaluation": 3.0, "training": 7.0}


def test_open_block_counts_without_phases_inside_it(clock: list[float]) -> None:
    watch = Stopwatch()
    with watch.timed("training"):
        clock[0] = 5.0
    with watch.timed("training"):
        clock[0] = 8.0
        with watch.timed("evaluation"):
            clock[0] = 10.0
        assert watch.so_far("training") == 8.0
        clock[0] = 11.0
        assert watch.so_far("training") == 9.0
        assert watch.so_far("checkpoint") == 0.0
    assert watch.so_far("training") == watch.seconds["training"] == 9.0


def test_rate_counts_the_seconds_of_its_phase_only(clock: list[float]) -> None:
    watch = Stopwatch()
    rate = Rate(watch, "training", 100)
    clock[0] = 50.0
    with watch.timed("training"):
        clock[0] = 52.0
        with watch.timed("evaluation"):
            clock[0] = 90.0
        assert rate.since_last(300) == 100.0
        clock[0] = 94.0
        assert rate.since_last(320) == 5.0


def test_block_that_raises_is_counted(clock: list[float]) -> None:
    def fails(watch: Stopwatch) -> None:
        with watch.timed("training"):
            clock[0] = 2.0
            raise KeyError

    watch = Stopwatch()
    with pytest.raises(KeyError):
        fails(watch)
    assert watch.seconds == {"training": 2.0}
