"""Progress of long work: a bar on a terminal, a line at intervals elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from tqdm import tqdm

LINE_SECONDS = 5.0


class Meter:
    """Counts towards ``total``; to be used as a context manager and called with every amount done.

    Args:
        what: two or three words for people.
        total: how much there is; None when unknown.
        say: receives a line every five seconds where there is no terminal.
        bar: draw a bar; default: when stderr is a terminal.
        unit: of what is counted, such as ``B`` for bytes.
    """

    def __init__(
        self,
        what: str,
        total: int | None,
        say: Callable[[str], None],
        *,
        bar: bool | None = None,
        unit: str = "B",
    ) -> None:
        self._what, self._total, self._say, self._unit = what, total, say, unit
        self._wants_bar = sys.stderr.isatty() if bar is None else bar
        self._bar: tqdm[Any] | None = None
        self._done, self._next_line = 0, time.monotonic() + LINE_SECONDS

    def __enter__(self) -> Meter:
        if self._wants_bar:
            self._bar = tqdm(
                desc=self._what, total=self._total, unit=self._unit, unit_scale=True, leave=False, file=sys.stderr
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, amount: int) -> None:
        """``amount`` more is done; a negative one takes back what has to be done again."""
        self._done += amount
        if self._bar is not None:
            self._bar.update(amount)
        elif time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + LINE_SECONDS
            share = f"{100 * self._done // self._total} % of " if self._total else ""
            count = self._total or self._done
            self._say(f"{self._what}: {share}{tqdm.format_sizeof(count, self._unit)}")

    def reach(self, done: int, total: int | None = None) -> None:
        """``done`` is done altogether, of ``total`` if that is known by now."""
        if total is not None and total != self._total:
            self._total = total
            if self._bar is not None:
                self._bar.total = total
        self(done - self._done)
