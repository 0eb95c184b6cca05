"""Parents and children, in real processes: neither a launcher's death nor that of this process leaves orphans."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from accel_train.process import launcher as module
from accel_train.process.launcher import is_orphan_of, launcher_pid, tied_to_this_process

needs_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks the Linux kernel")
LAUNCH_VARIABLES = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")


@pytest.fixture
def by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCH_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@needs_linux
@pytest.mark.parametrize("name", LAUNCH_VARIABLES)
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
    ("variables", "seconds", "heard"), [(LAUNCH_VARIABLES[:1], "20", "SIGTERM"), ((), "1", "None")]
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
    monkeypatch.setenv(LAUNCH_VARIABLES[0], "no")
    monkeypatch.setattr(module, "_ask_for_sigterm_when_parent_dies", lambda: None)
    assert not module.ask_for_sigterm_when_launcher_dies()
    parents = iter([os.getppid(), 1])
    monkeypatch.setattr(module.os, "getppid", lambda: next(parents))
    assert module.ask_for_sigterm_when_launcher_dies()


TYING = """
import os, subprocess, sys
from accel_train.process.launcher import tied_to_this_process
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
