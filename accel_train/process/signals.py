"""Signals and the launcher's death, turned into one flag that the loop reads between steps.

Handlers only set the flag: everything that must happen on preemption (agreement between the
ranks, checkpoint, record) happens at a step boundary. Schedulers often signal twice, so the
handlers are idempotent.

The launcher of this process and those that this one launches leave no orphans: a parent killed with SIGKILL
can tell nobody, so a child asks the kernel (Linux) for SIGTERM when its parent dies.
"""

from __future__ import annotations

import ctypes
import math
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)

# A launcher forwards the terminal's Ctrl-C to workers that already got it: two within this
# time are one.
_SAME_INTERRUPT_SECONDS = 1.0
# Of a rank that waits for the others to come: how often it looks up, and how long it stays once signalled.
_MEETING_POLL_SECONDS = 0.5
_MEETING_GRACE_SECONDS = 5.0

_PR_SET_PDEATHSIG = 1
# `accelerate launch` sets the first for every worker, torchrun the second.
_SET_BY_LAUNCHERS = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")


class StopSignal:
    """A request to stop: set by SIGTERM, SIGUSR1, SIGUSR2 and the first SIGINT.

    A second SIGINT, more than a second after the first, raises ``KeyboardInterrupt`` at once.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._interrupted_at: float | None = None

    @property
    def requested(self) -> bool:
        """Whether this process has been asked to stop."""
        return self.signal_name is not None

    def request(self, reason: str) -> None:
        """Ask for a stop from inside the process."""
        self.signal_name = self.signal_name or reason

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._interrupted_at is None:
                self._interrupted_at = now
            elif now - self._interrupted_at > _SAME_INTERRUPT_SECONDS:
                raise KeyboardInterrupt
        self.request(signal.Signals(number).name)

    @contextmanager
    def installed(self, *, until_exit: bool = False) -> Iterator[StopSignal]:
        """Handle the stop signals inside the block; main thread only.

        Args:
            until_exit: once a stop was requested, go on handling them after the block: a
                scheduler's second signal must not change the exit code of a process on its way out.
        """
        previous = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS}
        try:
            yield self
        finally:
            if not (until_exit and self.requested):
                for number, handler in previous.items():
                    signal.signal(number, handler)

    def die_with_launcher(self) -> None:
        """Under a launcher, ask the kernel (Linux) for SIGTERM when the launcher dies.

        Without this a launcher killed with SIGKILL leaves its workers running. Not armed when
        the script was started by hand, so that ``nohup`` and ``disown`` keep working.
        """
        if ask_for_sigterm_when_launcher_dies():
            self.request("death of the launcher")


@contextmanager
def leaving_on_stop_signals(code: int) -> Iterator[None]:
    """In the block, until a :class:`StopSignal` takes over: a stop signal ends the process with ``code``.

    For the seconds of importing, in which nothing has begun that could be saved. Main thread only.
    """

    def leave(_number: int, _frame: FrameType | None) -> None:
        raise SystemExit(code)

    previous = {number: signal.signal(number, leave) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            if signal.getsignal(number) is leave:
                signal.signal(number, handler)


@contextmanager
def leaving_while_ranks_meet(code: int, stop: StopSignal) -> Iterator[None]:
    """In the block, until the ranks have met: ``stop`` or the launcher's death ends the process with ``code``.

    They meet in a call that runs no Python signal handler. Without this, a rank whose launcher is gone, or
    that waits for one that never comes, would be deaf for the whole timeout. A stop signal waits a few
    seconds for them to meet after all, so that they can agree on it. Nothing has begun that could be saved.
    Main thread only; does nothing for one process without a launcher.
    """
    launcher = launcher_pid()
    if launcher is None and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    met = threading.Event()
    arrivals, wakeup = socket.socketpair()
    wakeup.setblocking(False)

    def watch() -> None:
        leave_at = time.monotonic() + _MEETING_GRACE_SECONDS if stop.requested else math.inf
        while not met.is_set():
            arrived = arrivals.recv(256) if select.select([arrivals], [], [], _MEETING_POLL_SECONDS)[0] else b""
            if any(number in STOP_SIGNALS for number in arrived):
                leave_at = min(leave_at, time.monotonic() + _MEETING_GRACE_SECONDS)
            if time.monotonic() > leave_at or (launcher is not None and is_orphan_of(launcher)):
                os._exit(code)

    thread = threading.Thread(target=watch, name="meeting-watch", daemon=True)
    previous = -1
    try:
        # Python's own handler writes the number of every signal here at once, whatever the main thread is doing.
        previous = signal.set_wakeup_fd(wakeup.fileno(), warn_on_full_buffer=False)
        thread.start()
        yield
    finally:
        # A second interrupt may raise anywhere in here: what must not be left behind comes first.
        met.set()
        signal.set_wakeup_fd(previous)
        with arrivals, wakeup:
            wakeup.send(b"\0")  # no signal has this number: the thread need not be waited for
            if thread.ident is not None:
                thread.join()


def launcher_pid() -> int | None:
    """Return the process id of the launcher; None off Linux, or when the script was started by hand.

    The launcher's death concerns only those it started: ``nohup`` and ``disown`` keep working.
    """
    is_launched = any(name in os.environ for name in _SET_BY_LAUNCHERS)
    return os.getppid() if is_launched and sys.platform.startswith("linux") else None


def is_orphan_of(parent: int) -> bool:
    """Whether ``parent``, an earlier answer of :func:`launcher_pid`, is not (or no longer) the launcher."""
    return os.getppid() != parent or (parent == 1 and not _process_1_is_launcher())


def ask_for_sigterm_when_launcher_dies() -> bool:
    """Ask the kernel for SIGTERM when the launcher dies; does nothing without a launcher.

    Call it as early as possible: where orphans get another parent than process 1, the death of a launcher
    before the first call goes unnoticed.

    Returns:
        Whether the launcher is dead already.
    """
    launcher = launcher_pid()
    if launcher is None:
        return False
    _ask_for_sigterm_when_parent_dies()
    # The launcher may have died before the request was registered.
    return is_orphan_of(launcher)


def tied_to_this_process(line: Sequence[str]) -> list[str]:
    """Return a command that becomes ``line`` and gets SIGTERM when this process dies, however it dies (Linux)."""
    # Not between fork and exec: in a process with threads only signal-safe calls are allowed there.
    code = f"import sys; from {__name__} import _become; _become({os.getpid()}, sys.argv[1:])"
    return [sys.executable, "-c", code, *line]


def _become(parent: int, line: list[str]) -> None:
    _ask_for_sigterm_when_parent_dies()
    if os.getppid() == parent:  # otherwise it died before it could be asked for
        os.execvp(line[0], line)


def _ask_for_sigterm_when_parent_dies() -> None:
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def _process_1_is_launcher() -> bool:
    """As in a container whose command is the launcher itself: then process 1 is no sign of an orphan."""
    with suppress(OSError):
        command = Path("/proc/1/cmdline").read_bytes()
        return any(name in command for name in (b"accelerate", b"torchrun", b"torch.distributed"))
    return False
