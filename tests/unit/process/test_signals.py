"""Stop signals, parents and children, in real processes: one flag, heard between steps, and no orphans."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from accel_train.process import signals as module
from accel_train.process.signals import (
    STOP_SIGNALS,
    StopSignal,
    is_orphan_of,
    launcher_pid,
    leaving_on_stop_signals,
    leaving_while_ranks_meet,
    tied_to_this_process,
)

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


needs_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks the Linux kernel")
SET_BY_LAUNCHERS = LAUNCH_VARIABLES[:2]


@pytest.fixture
def by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SET_BY_LAUNCHERS:
        monkeypatch.delenv(name, raising=False)


@needs_linux
@pytest.mark.parametrize("name", SET_BY_LAUNCHERS)
@pytest.mark.usefixtures("by_hand")
def test_launcher_is_the_parent_of_what_it_started(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    assert launcher_pid() is None
    monkeypatch.setenv(name, "no")
    assert launcher_pid() == os.getppid()


def test_process_with_another_parent_is_an_orphan() -> None:
    assert not is_orphan_of(os.getppid())
    assert is_orphan_of(os.getpid())


@pytest.mark.parametrize("in_container", [False, True])
def test_process_1_is_no_sign_of_an_orphan_when_it_launches(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, in_container: bool
) -> None:
    """In a container the launcher may be the first process."""
    cmdline = tmp_path / "cmdline"
    cmdline.write_bytes(b"python\0-m\0torch.distributed.run" if in_container else b"/sbin/init\0")
    monkeypatch.setattr(module, "Path", lambda _path: cmdline)
    monkeypatch.setattr(module.os, "getppid", lambda: 1)
    assert is_orphan_of(1) != in_container


WORKER = """
import sys, time
from accel_train.process.signals import StopSignal
stop = StopSignal()
with stop.installed():
    stop.die_with_launcher()
    print("armed", flush=True)
    deadline = time.monotonic() + float(sys.argv[1])
    while time.monotonic() < deadline and not stop.requested:
        time.sleep(0.01)
    open(sys.argv[2], "w").write(str(stop.signal_name))
"""
DYING_LAUNCHER = """
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", *sys.argv[1:]], stdout=subprocess.PIPE, text=True)
child.stdout.readline()
os.kill(os.getpid(), 9)
"""


@needs_linux
@pytest.mark.usefixtures("by_hand")
@pytest.mark.parametrize(
    ("variables", "seconds", "heard"), [(SET_BY_LAUNCHERS[:1], "20", "SIGTERM"), ((), "1", "None")]
)
def test_worker_hears_of_its_launchers_death_unless_by_hand(
    tmp_path: Path, variables: tuple[str, ...], seconds: str, heard: str
) -> None:
    flag = tmp_path / "flag"
    line = [sys.executable, "-c", DYING_LAUNCHER, WORKER, seconds, str(flag)]
    launcher = subprocess.Popen(line, env={**os.environ, **dict.fromkeys(variables, "no")})
    assert launcher.wait(timeout=30) == -signal.SIGKILL
    deadline = time.monotonic() + 20
    while not (flag.exists() and flag.read_text()):
        assert time.monotonic() < deadline, "the worker never ended"
        time.sleep(0.05)
    assert flag.read_text() == heard


@needs_linux
@pytest.mark.usefixtures("by_hand")
def test_worker_of_a_dead_launcher_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher died after the first question for its id: the kernel sends nothing any more."""
    monkeypatch.setenv(SET_BY_LAUNCHERS[0], "no")
    monkeypatch.setattr(module, "_ask_for_sigterm_when_parent_dies", lambda: None)
    assert not module.ask_for_sigterm_when_launcher_dies()
    parents = iter([os.getppid(), 1])
    monkeypatch.setattr(module.os, "getppid", lambda: next(parents))
    assert module.ask_for_sigterm_when_launcher_dies()


TYING = """
import os, subprocess, sys
from accel_train.process.signals import tied_to_this_process
child = subprocess.Popen(tied_to_this_process([sys.executable, "-c", "print('going', flush=True); input()"]),
                         stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
child.stdout.readline()
print(child.pid, flush=True)
input()
"""


@needs_linux
def test_tied_child_dies_with_a_killed_parent() -> None:
    """The test holds the child's standard input open; that alone does not end it."""
    with subprocess.Popen(
        [sys.executable, "-c", TYING], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        assert child.is_running()
        parent.kill()
    child.wait(timeout=20)


def test_tied_command_becomes_the_line_with_its_arguments() -> None:
    line = tied_to_this_process([sys.executable, "-c", "import sys; print(sys.argv[1:]); sys.exit(7)", "a b", "--c"])
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (7, "['a b', '--c']\n")


@needs_linux
def test_tied_command_of_a_dead_parent_does_nothing() -> None:
    line = tied_to_this_process([sys.executable, "-c", "print('begun')"])
    line[2] = line[2].replace(f"_become({os.getpid()}", "_become(-1")
    assert "-1" in line[2]
    assert subprocess.run(line, capture_output=True, text=True, check=True).stdout == ""
