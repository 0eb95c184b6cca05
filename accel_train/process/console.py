"""What a process writes for people: lines on stdout, messages on stderr, progress of long work; logs beside them.

On a terminal long work draws a bar, which no line tears; elsewhere it writes a line at intervals, so that a log
file stays readable. A reader who is gone (``| head``, a closed terminal) never stops the work.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

try:
    from tqdm import tqdm
except ImportError:  # `accel-train pipeline` speaks before it finds out which packages are missing
    tqdm = None  # type: ignore[assignment,misc]

LINE_SECONDS = 5.0


def say(phase: str, what: str) -> None:
    """Print one line of progress: the phase, then what happened."""
    print_line(f"{phase:<10} {what}")


def print_line(line: str, stream: Literal["stdout", "stderr"] = "stdout") -> None:
    """Print one line at once, above the bars; it is lost when nobody reads any more."""
    try:
        file = getattr(sys, stream)
        if tqdm is None:
            file.write(f"{line}\n")
        else:
            tqdm.write(line, file=file)
        file.flush()
    except OSError:
        setattr(sys, stream, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115 - for the rest of the process


class ConsoleHandler(logging.Handler):
    """Log messages on stderr, in the form of the command line's own errors."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one message, with its traceback if it has one."""
        print_line(f"accel-train: {record.levelname.lower()}: {self.format(record)}", "stderr")


class RunLog:
    """The log of one launch: all of it in ``logs/rank_N.log``, the grave part on stderr too.

    Stderr shows the warnings of rank 0, and the errors of the first rank of every other machine: what rank 0
    writes is not seen on that machine's screen.

    Args:
        rank: of this process.
    """

    def __init__(self, rank: int) -> None:
        self._rank, self._logger = rank, logging.getLogger("accel_train")
        self._handlers: list[logging.Handler] = []
        self.is_on_screen = os.environ.get("LOCAL_RANK", str(rank)) == "0"
        """Whether errors of this process are shown."""
        # Without any handler Python would print the warnings of every rank.
        console = ConsoleHandler(logging.WARNING if rank == 0 else logging.ERROR)
        self._add(console if self.is_on_screen else logging.NullHandler())

    def open(self, run_dir: Path, launch: int) -> None:
        """Append to the rank's file in ``run_dir`` from here on."""
        directory = run_dir / "logs"
        directory.mkdir(exist_ok=True)
        handler = logging.FileHandler(directory / f"rank_{self._rank}.log", encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        self._logger.setLevel(logging.INFO)
        self._add(handler)
        self._logger.info("launch %d, rank %d, pid %d", launch, self._rank, os.getpid())

    def close(self) -> None:
        """Stop logging; safe to call twice."""
        while self._handlers:
            handler = self._handlers.pop()
            self._logger.removeHandler(handler)
            handler.close()

    def _add(self, handler: logging.Handler) -> None:
        self._logger.addHandler(handler)
        self._handlers.append(handler)


class Meter:
    """Progress of long work: a context manager, called with every amount that is done.

    Args:
        what: the work, in two or three words.
        total: the whole amount; None when unknown.
        say: receives a line every five seconds when stderr is no terminal, on which a bar is drawn.
        unit: unit of the amounts, such as ``B`` for bytes.
    """

    def __init__(self, what: str, total: int | None, say: Callable[[str], None], *, unit: str = "B") -> None:
        self._what, self._total, self._say, self._unit = what, total, say, unit
        self._bar: tqdm[Any] | None = None
        self._done, self._next_line = 0, time.monotonic() + LINE_SECONDS

    def __enter__(self) -> Meter:
        if sys.stderr.isatty():
            self._bar = tqdm(desc=self._what, total=self._total, unit=self._unit, unit_scale=True, leave=False)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, amount: int) -> None:
        """Add ``amount`` to what is done; a negative amount has to be done again."""
        self._done += amount
        if self._bar is not None:
            self._bar.update(amount)
        elif time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + LINE_SECONDS
            share = f"{100 * self._done // self._total} % of " if self._total else ""
            count = self._total or self._done
            self._say(f"{self._what}: {share}{tqdm.format_sizeof(count, self._unit)}")

    def reach(self, done: int, total: int | None = None) -> None:
        """Set what is done to ``done``, and the whole amount to ``total`` if it is known by now."""
        if total is not None and total != self._total:
            self._total = total
            if self._bar is not None:
                self._bar.total = total
        self(done - self._done)
