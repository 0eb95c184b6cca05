"""One live process per run directory, and no wait for the dead."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import asdict, replace

import pytest

from accel_train.errors import Interrupted, RunLocked
from accel_train.process.work import WorkContext
from accel_train.runs import lock as lock_module
from accel_train.runs.lock import LOCK_FILE, OWNER_FILE, Owner, RunLock, live_runs, read_owner

HOLD = """
import sys, time
from pathlib import Path
from accel_train.runs.lock import RunLock
lock = RunLock(Path(sys.argv[1]), timeout=0)
lock.acquire()
print("held", flush=True)
sys.stdin.read()
lock.release()
"""

HOLD_WITH_A_CHILD_THAT_OUTLIVES_IT = """
import fcntl, os, sys, time
from pathlib import Path
from accel_train.runs.lock import RunLock
lock = RunLock(Path(sys.argv[1]), timeout=0)
lock.acquire()
# A child that shares the open file, as workers forked under an older filelock do.
shared = os.dup(lock._flock._context.lock_file_fd)
child = os.fork()
if child == 0:
    sys.stdin.read()
    os._exit(0)
print("held", child, flush=True)
time.sleep(600)
"""


class Holder:
    """A real process that holds the lock of a directory."""

    def __init__(self, run_dir, script=HOLD, **env):
        self.process = subprocess.Popen(
            [sys.executable, "-c", script, str(run_dir)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **env},
        )
        self.said = self.process.stdout.readline().split()
        assert self.said[0] == "held"

    def let_go(self):
        self.process.stdin.close()

    def kill(self):
        self.process.kill()

    def reap(self):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        self.process.stdin.close()


@pytest.fixture
def holder(tmp_path):
    holder = Holder(tmp_path, SLURM_JOB_ID="77")
    yield holder
    holder.reap()


def of_another_host(**changes) -> Owner:
    there = Owner("elsewhere", 1, "9", "boot", "5", "2026-01-01T00:00:00+00:00", "token", 3)
    return replace(there, **changes)


def plant(run_dir, owner: Owner) -> None:
    (run_dir / OWNER_FILE).write_text(json.dumps(asdict(owner)))


@contextmanager
def held(lock: RunLock):
    lock.acquire()
    try:
        yield
    finally:
        lock.release()


def test_lock_names_its_holder_and_leaves_nothing_behind(tmp_path):
    with held(RunLock(tmp_path, timeout=0)):
        owner = read_owner(tmp_path)
        assert (owner.host, owner.pid) == (socket.gethostname(), os.getpid())

    assert read_owner(tmp_path) is None
    assert {path.name for path in tmp_path.iterdir()} <= {LOCK_FILE}


def test_lock_can_be_taken_again_after_release(tmp_path):
    lock = RunLock(tmp_path, timeout=0)
    for _ in range(2):
        with held(lock):
            assert live_runs([tmp_path])


def test_live_process_is_named_with_host_job_and_start(tmp_path, holder):
    with pytest.raises(RunLocked) as caught:
        RunLock(tmp_path, timeout=0.2).acquire()

    owner = read_owner(tmp_path)
    assert (owner.pid, owner.host, owner.job) == (holder.process.pid, socket.gethostname(), "77")
    for part in (str(tmp_path), str(holder.process.pid), socket.gethostname(), "job 77", owner.started_at):
        assert part in str(caught.value)


def test_failed_attempt_does_not_disturb_the_holder(tmp_path, holder):
    for _ in range(2):
        with pytest.raises(RunLocked):
            RunLock(tmp_path, timeout=0).acquire()
    assert live_runs([tmp_path])


def test_waiter_gets_the_lock_when_the_holder_lets_go(tmp_path, holder):
    lines = []

    def say(phase, line):
        lines.append(f"{phase}: {line}")
        holder.let_go()

    with held(RunLock(tmp_path, 60, WorkContext(say=say))):
        assert read_owner(tmp_path).pid == os.getpid()
    assert len(lines) == 1
    assert lines[0].startswith(f"lock: waiting for process {holder.process.pid} on host ")


def test_lock_of_a_killed_process_is_taken_over_at_once(tmp_path, holder):
    holder.kill()
    holder.process.wait()
    assert read_owner(tmp_path).pid == holder.process.pid

    with held(RunLock(tmp_path, timeout=0)):
        assert read_owner(tmp_path).pid == os.getpid()


def test_zombie_counts_as_dead(tmp_path, holder):
    holder.kill()
    os.waitid(os.P_PID, holder.process.pid, os.WEXITED | os.WNOWAIT)  # dead, but not reaped

    assert not live_runs([tmp_path])
    RunLock(tmp_path, timeout=0).acquire()


def test_children_of_a_killed_holder_are_waited_for(tmp_path):
    holder = Holder(tmp_path, HOLD_WITH_A_CHILD_THAT_OUTLIVES_IT)
    child = int(holder.said[1])
    holder.kill()
    holder.process.wait()
    try:
        with pytest.raises(RunLocked, match="children of process"):
            RunLock(tmp_path, timeout=0.2).acquire()
        assert not live_runs([tmp_path])

        with held(RunLock(tmp_path, 60, WorkContext(say=lambda *_: os.kill(child, signal.SIGKILL)))):
            assert read_owner(tmp_path).pid == os.getpid()
    finally:
        holder.reap()


@pytest.mark.parametrize("changes", [{"process_start": "1"}, {"boot_id": "an earlier boot"}, {"pid": 2**22 + 1}])
def test_recycled_pid_and_restarted_host_count_as_dead(tmp_path, changes):
    with held(RunLock(tmp_path, timeout=0)):
        ours = read_owner(tmp_path)
    plant(tmp_path, replace(ours, **changes))

    assert not live_runs([tmp_path])
    RunLock(tmp_path, timeout=0).acquire()


def test_live_local_process_keeps_the_lock_without_flock(tmp_path, monkeypatch):
    """However long its counter stands still, as that of a stopped process does."""
    monkeypatch.setattr(lock_module, "STALE_SECONDS", 0.1)
    with held(RunLock(tmp_path, timeout=0)):
        ours = read_owner(tmp_path)
    plant(tmp_path, ours)  # a live owner, and a free flock

    with pytest.raises(RunLocked):
        RunLock(tmp_path, timeout=0.4).acquire()


def test_lock_of_another_host_ends_when_its_counter_stands_still(tmp_path, monkeypatch):
    monkeypatch.setattr(lock_module, "STALE_SECONDS", 0.4)
    plant(tmp_path, of_another_host())

    started = time.monotonic()
    with held(RunLock(tmp_path, timeout=60)):
        assert read_owner(tmp_path).pid == os.getpid()
    assert time.monotonic() - started >= 0.4


def test_lock_of_another_host_holds_while_its_counter_moves(tmp_path, monkeypatch):
    monkeypatch.setattr(lock_module, "STALE_SECONDS", 0.5)
    counter = iter(range(10**6))
    plant(tmp_path, of_another_host())

    def heartbeat():
        plant(tmp_path, of_another_host(heartbeat=next(counter)))
        return False

    # Each poll finds another count: three times STALE_SECONDS pass without a takeover.
    with pytest.raises(RunLocked) as caught:
        RunLock(tmp_path, 1.5, WorkContext(should_stop=heartbeat)).acquire()
    assert next(counter) > 3
    assert "on host elsewhere" in str(caught.value)


def test_wall_clocks_are_not_compared(tmp_path):
    plant(tmp_path, of_another_host(started_at="1970-01-01T00:00:00+00:00"))
    os.utime(tmp_path / OWNER_FILE, (0, 0))

    with pytest.raises(RunLocked):
        RunLock(tmp_path, timeout=0.3).acquire()


def test_heartbeat_moves_the_counter(tmp_path, monkeypatch):
    monkeypatch.setattr(lock_module, "HEARTBEAT_SECONDS", 0.01)
    with held(RunLock(tmp_path, timeout=0)):
        deadline = time.monotonic() + 30
        while read_owner(tmp_path).heartbeat < 3:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_holder_that_was_taken_over_leaves_the_new_owner_alone(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(lock_module, "HEARTBEAT_SECONDS", 0.01)
    lock = RunLock(tmp_path, timeout=0)
    lock.acquire()
    beat = lock._thread
    lock._stop.set()
    beat.join()
    plant(tmp_path, of_another_host())
    lock._stop.clear()
    lock._beat()  # returns by itself only when it sees the other owner

    lock.release()

    assert "taken over by process 1 on host elsewhere" in caplog.text
    assert read_owner(tmp_path) == of_another_host()


def test_second_host_cannot_claim_what_the_first_has_claimed(tmp_path, monkeypatch):
    def first_host_is_faster(path, owner):
        plant(tmp_path, of_another_host())
        return write_aside(path, owner)

    write_aside = lock_module._write_aside
    monkeypatch.setattr(lock_module, "_write_aside", first_host_is_faster)

    with pytest.raises(RunLocked):
        RunLock(tmp_path, timeout=0).acquire()
    assert read_owner(tmp_path) == of_another_host()


def test_takeover_of_the_dead_spares_a_faster_host(tmp_path, monkeypatch):
    """Between the look at the dead owner and the removal of its file, another host has taken over."""
    with held(RunLock(tmp_path, timeout=0)):
        ours = read_owner(tmp_path)
    plant(tmp_path, replace(ours, process_start="1"))

    def first_host_is_faster(length):
        plant(tmp_path, of_another_host())
        return "f" * length

    monkeypatch.setattr(lock_module.secrets, "token_hex", first_host_is_faster)

    with pytest.raises(RunLocked, match="elsewhere"):
        RunLock(tmp_path, timeout=0).acquire()
    assert read_owner(tmp_path) == of_another_host()
    assert not list(tmp_path.glob(f"{OWNER_FILE}.*"))


def test_lock_needs_no_hard_links(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError("as on FAT")

    monkeypatch.setattr(lock_module.os, "link", refuse)
    with held(RunLock(tmp_path, timeout=0)):
        assert read_owner(tmp_path).pid == os.getpid()
        with pytest.raises(RunLocked):
            RunLock(tmp_path, timeout=0).acquire()


def test_fifo_in_the_place_of_the_owner_file_hangs_nobody(tmp_path):
    os.mkfifo(tmp_path / OWNER_FILE)
    assert not live_runs([tmp_path])
    with held(RunLock(tmp_path, timeout=0)):
        assert read_owner(tmp_path).pid == os.getpid()


@pytest.mark.parametrize("content", ["", '{"host": "el', "[1]", "{}", "[" * 5000])
def test_damaged_owner_file_is_replaced(tmp_path, content):
    (tmp_path / OWNER_FILE).write_text(content)
    (tmp_path / f"{OWNER_FILE}.leaving").write_text("")

    with held(RunLock(tmp_path, timeout=0)):
        assert read_owner(tmp_path).pid == os.getpid()
        assert not (tmp_path / f"{OWNER_FILE}.leaving").exists()


def test_waiting_ends_when_told_to_stop(tmp_path, holder):
    with pytest.raises(Interrupted, match="waiting for process"):
        RunLock(tmp_path, 60, WorkContext(should_stop=lambda: True)).acquire()


def test_threads_of_one_process_exclude_each_other(tmp_path):
    refused = []

    def other():
        try:
            RunLock(tmp_path, timeout=0).acquire()
        except RunLocked as error:
            refused.append(error)

    with held(RunLock(tmp_path, timeout=0)):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert len(refused) == 1


def test_executed_children_do_not_inherit_the_lock(tmp_path):
    lock = RunLock(tmp_path, timeout=0)
    lock.acquire()
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, close_fds=False)
    try:
        lock.release()
        with held(RunLock(tmp_path, timeout=0)):
            assert child.poll() is None
    finally:
        child.communicate(b"\n")


def test_forked_child_cannot_release_the_lock_of_its_parent(tmp_path):
    lock = RunLock(tmp_path, timeout=0)
    lock.acquire()
    child = os.fork()
    if child == 0:
        lock.release()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0

    assert read_owner(tmp_path).pid == os.getpid()
    with pytest.raises(RunLocked):
        RunLock(tmp_path, timeout=0).acquire()
    lock.release()


def test_release_is_harmless_when_nothing_is_held(tmp_path):
    lock = RunLock(tmp_path, timeout=0)
    lock.release()
    lock.acquire()
    lock.release()
    lock.release()
    assert not live_runs([tmp_path])


def test_live_runs_looks_up_this_host_and_watches_others(tmp_path, holder, monkeypatch):
    monkeypatch.setattr(lock_module, "HEARTBEAT_SECONDS", 0.1)
    beating, silent, empty = (tmp_path / name for name in ("beating", "silent", "empty"))
    for directory in (beating, silent, empty):
        directory.mkdir()
    plant(beating, of_another_host())
    plant(silent, of_another_host())
    sleep = time.sleep

    def sleep_and_beat(seconds):
        plant(beating, of_another_host(heartbeat=read_owner(beating).heartbeat + 1))
        sleep(seconds)

    monkeypatch.setattr(lock_module.time, "sleep", sleep_and_beat)

    assert live_runs([tmp_path, beating, silent, empty]) == {tmp_path, beating}


def test_probing_never_touches_the_lock_file(tmp_path):
    assert not live_runs([tmp_path])
    assert list(tmp_path.iterdir()) == []
