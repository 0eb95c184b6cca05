"""Stop signals, in real processes: one flag, heard between steps."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from accel_train.process import signals as module
from accel_train.process.signals import STOP_SIGNALS, StopSignal, leaving_on_stop_signals, leaving_while_ranks_meet

LAUNCH_VARIABLES = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID", "WORLD_SIZE")


@pytest.fixture
def in_child() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a process that runs some code under ``env`` alone; it has printed its first line."""
    processes: list[subprocess.Popen[str]] = []

    def start(code: str, **env: str) -> subprocess.Popen[str]:
        clean = {name: value for name, value in os.environ.items() if name not in LAUNCH_VARIABLES}
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=clean | env)
        processes.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_stop_signal_sets_the_flag_and_twice_is_once(number: signal.Signals) -> None:
    stop = StopSignal()
    with stop.installed():
        signal.raise_signal(number)
        signal.raise_signal(number)
    assert stop.signal_name == number.name


def test_first_reason_stays() -> None:
    stop = StopSignal()
    assert not stop.requested
    stop.request("death of the launcher")
    stop.request("SIGTERM")
    assert stop.signal_name == "death of the launcher"


@pytest.mark.parametrize(("seconds", "raises"), [(0.9, False), (1.1, True)])
def test_second_interrupt_after_a_second_stops_at_once(
    monkeypatch: pytest.MonkeyPatch, seconds: float, raises: bool
) -> None:
    """Within a second both are one Ctrl-C, which the launcher has passed on."""
    clock = iter([10.0, 10.0 + seconds])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    stop = StopSignal()
    with stop.installed():
        signal.raise_signal(signal.SIGINT)
        if raises:
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        else:
            signal.raise_signal(signal.SIGINT)
    assert stop.signal_name == "SIGINT"


@pytest.mark.parametrize("until_exit", [False, True])
@pytest.mark.parametrize("signalled", [False, True])
def test_handlers_stay_until_exit_only_when_asked_and_signalled(until_exit: bool, signalled: bool) -> None:
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    stop = StopSignal()
    try:
        with stop.installed(until_exit=until_exit):
            if signalled:
                signal.raise_signal(signal.SIGUSR1)
        kept = signal.getsignal(signal.SIGUSR1) == stop._handle
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert kept == (until_exit and signalled)


LEAVING = """
import signal, time
from accel_train.process.signals import leaving_on_stop_signals
with leaving_on_stop_signals(75):
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_signal_during_imports_leaves_with_the_code(in_child, number: signal.Signals) -> None:
    process = in_child(LEAVING)
    process.send_signal(number)
    assert process.wait(timeout=20) == 75


def test_imports_give_back_only_their_own_handlers() -> None:
    before = signal.getsignal(signal.SIGTERM)
    stop = StopSignal()
    with stop.installed():
        pass
    with leaving_on_stop_signals(75):
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
    try:
        with leaving_on_stop_signals(75):
            signal.signal(signal.SIGTERM, stop._handle)
        assert signal.getsignal(signal.SIGTERM) == stop._handle
    finally:
        signal.signal(signal.SIGTERM, before)


MEETING = """
import sys, time
from accel_train.process.signals import StopSignal, leaving_while_ranks_meet
stop = StopSignal()
with stop.installed():
    with leaving_while_ranks_meet(75, stop):
        print("ready", flush=True)
        time.sleep(float(sys.argv[1]))
    print("met", stop.signal_name, flush=True)
"""


@pytest.mark.parametrize(("seconds", "code", "says"), [(2, 0, "met SIGUSR1\n"), (60, 75, "")])
def test_signalled_ranks_have_a_few_seconds_to_meet(in_child, seconds: float, code: int, says: str) -> None:
    """Of ranks launched by hand one is signalled alone; those that come within the time agree with it."""
    process = in_child(MEETING.replace("sys.argv[1]", repr(seconds)), WORLD_SIZE="2")
    process.send_signal(signal.SIGUSR1)
    out, _ = process.communicate(timeout=20)
    assert (process.returncode, out) == (code, says)


ORPHANED_MEETING = """
import os, subprocess, sys
worker = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE, text=True)
worker.stdout.readline()
print("ready", flush=True)
print(worker.pid, flush=True)
os.kill(os.getpid(), 9)
"""


def test_meeting_ends_when_the_launcher_dies(in_child) -> None:
    worker = MEETING.replace("sys.argv[1]", "60")
    launcher = in_child(
        ORPHANED_MEETING.replace("sys.argv[1]", repr(worker)), WORLD_SIZE="2", ACCELERATE_MIXED_PRECISION="no"
    )
    pid = int(launcher.stdout.readline())
    launcher.wait(timeout=20)
    deadline = time.monotonic() + 20
    while _is_running(pid):
        assert time.monotonic() < deadline, "the orphan waits on"
        time.sleep(0.05)


def _is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as stat:  # noqa: PTH123
            return stat.read().rpartition(")")[2].split()[0] not in {"Z", "X"}
    except OSError:
        return False


@pytest.mark.parametrize(("world", "watched"), [("1", False), ("2", True)])
def test_meeting_leaves_no_thread_behind(monkeypatch: pytest.MonkeyPatch, world: str, watched: bool) -> None:
    for name in LAUNCH_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", world)

    def names() -> set[str]:
        return {thread.name for thread in threading.enumerate()}

    with leaving_while_ranks_meet(75, StopSignal()):
        assert ("meeting-watch" in names()) == watched
    assert "meeting-watch" not in names()
    previous = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(previous)
    assert previous == -1
