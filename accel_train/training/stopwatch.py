"""Seconds by phase; a phase inside another counts for itself only."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """Adds up wall-clock seconds under names."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the block's seconds to ``phase``, less those of phases timed inside it."""
        inner, started = sum(self.seconds.values()), time.perf_counter()
        try:
            yield
        finally:
            nested = sum(self.seconds.values()) - inner
            elapsed = time.perf_counter() - started
            self.seconds[phase] = self.seconds.get(phase, 0.0) + elapsed - nested

    def idle_of(self, phase: str) -> float:
        """Seconds counted under any other phase than ``phase``."""
        return sum(seconds for name, seconds in self.seconds.items() if name != phase)
