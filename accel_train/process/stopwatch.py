"""Seconds by phase; a phase inside another counts for itself only."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """Adds up wall-clock seconds under names."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._running: list[tuple[str, float, float]] = []

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the block's seconds to ``phase``, less those of phases timed inside it."""
        self._running.append((phase, sum(self.seconds.values()), time.perf_counter()))
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + self._of(self._running.pop())

    def _of(self, block: tuple[str, float, float]) -> float:
        _, inner, started = block
        return time.perf_counter() - started - (sum(self.seconds.values()) - inner)

    def so_far(self, phase: str) -> float:
        """Seconds of ``phase``, with those of a block that goes on; ask for it in no other phase inside that block."""
        return self.seconds.get(phase, 0.0) + sum(self._of(block) for block in self._running if block[0] == phase)


class Rate:
    """How fast a count grows in one phase; time in other phases is left out.

    Args:
        clock: times the phases.
        phase: the one in which the count grows.
        count: as it stands now.
    """

    def __init__(self, clock: Stopwatch, phase: str, count: int) -> None:
        self._clock, self._phase = clock, phase
        self._mark = (clock.so_far(phase), count)

    def since_last(self, count: int) -> float:
        """Return the growth per second since the last call."""
        before, known = self._mark
        self._mark = (self._clock.so_far(self._phase), count)
        return (count - known) / max(self._mark[0] - before, 1e-9)
