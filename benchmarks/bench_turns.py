"""Programs that train in turns: one at a time has its few steps while the others wait.

All are set up before the first is timed. A machine whose speed moves by a third within minutes is then
the same for all of them.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import IO

from bench_loops import synchronize


class Turns:
    """A contestant's end of the baton: waits for its turn after every block of steps.

    Args:
        steps: of the whole run; the trainer ends after them.
        block: steps of a turn. The first block is not timed.
        baton: where a line arrives for every turn.
        report: where the seconds of every turn go, a line each; "ready" after the first block.
    """

    def __init__(self, steps: int, block: int, baton: IO[str], report: IO[str]) -> None:
        self.steps = steps
        self._block, self._baton, self._report = block, baton, report
        self._done, self._began = 0, 0.0

    @property
    def over(self) -> bool:
        """All steps are done."""
        return self._done == self.steps

    def step(self) -> None:
        """To be called at the end of every step."""
        self._done += 1
        if self._done % self._block:
            return
        synchronize()
        seconds = time.perf_counter() - self._began
        print("ready" if self._done == self._block else seconds, file=self._report, flush=True)
        # After the last block as well: nothing is torn down while another's steps are timed.
        if not self._baton.readline() and not self.over:
            raise SystemExit(f"no turn is left after {self._done} of {self.steps} steps")
        self._began = time.perf_counter()


def in_turns(lines: Mapping[str, Sequence[str]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every contestant's turn in every round; another begins each round. Progress goes to stderr.

    Args:
        lines: command line of each contestant, whose :class:`Turns` reads stdin and reports to stdout.
        rounds: turns of each; its first block, before them, is not among them.

    Raises:
        RuntimeError: a contestant failed; the message has what it said.
    """
    names = list(lines)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with ExitStack() as stack:
        running = {name: stack.enter_context(_started(name, line)) for name, line in lines.items()}
        print(f"starting {', '.join(names)}", file=sys.stderr, flush=True)
        for each in running.values():
            each.wait_until_ready()
        for number in range(rounds):
            print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
            for name in [*names[number % len(names) :], *names[: number % len(names)]]:
                seconds[name].append(running[name].take_turn())
        for each in running.values():
            each.finish()
    return seconds


class _Running:
    """A contestant's process."""

    def __init__(self, name: str, process: subprocess.Popen[str], said: IO[str]) -> None:
        self._name, self._process, self._said = name, process, said

    def wait_until_ready(self) -> None:
        line = self._line()
        if line != "ready":
            raise self._failed(f"reported {line!r} where it should be ready")

    def take_turn(self) -> float:
        """Let it train a block; returns its seconds."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        line = self._line()
        try:
            return float(line)
        except ValueError:
            raise self._failed(f"reported {line!r} where the seconds of its turn should be") from None

    def finish(self) -> None:
        """Let it end, as its users' runs do."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        if self._process.wait():
            raise self._failed(f"ended badly (exit {self._process.returncode})")

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._failed(f"ended (exit {self._process.wait()})")
        return line.rstrip("\n")

    def _failed(self, how: str) -> RuntimeError:
        self._said.seek(0)
        return RuntimeError(f"{self._name} {how}:\n{self._said.read()[-3000:]}")


@contextmanager
def _started(name: str, line: Sequence[str]) -> Iterator[_Running]:
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said,
        subprocess.Popen(
            line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True, encoding="utf-8"
        ) as process,
    ):
        try:
            yield _Running(name, process, said)
        except BaseException:
            process.kill()
            raise
