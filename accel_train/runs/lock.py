"""The lock of a run directory: one live process at a time, across hosts, and no wait for the dead.

It has two layers. The kernel frees an flock when its last holder dies. An owner file names the holder, and holds
where flock does not reach other hosts; its heartbeat counter is judged by whether it moves on the waiter's own
monotonic clock, since wall clocks of different hosts differ. The price is ``STALE_SECONDS`` of waiting before
a dead process of another host gives way.

A process forked by the holder may keep the flock until it exits (data-loading workers outlive a killed parent by
seconds), so a lock of the dead is waited for like one of the living. A process started by exec never inherits it.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from accel_train.errors import RunLocked
from accel_train.process.work import SILENT, WorkContext

LOCK_FILE = ".lock"
OWNER_FILE = ".lock-owner.json"
HEARTBEAT_SECONDS = 2.0
STALE_SECONDS = 30.0
"""Without a heartbeat, after which the hold of another host has ended."""
_POLL_SECONDS = 0.1
_MAX_OWNER_BYTES = 4096

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Owner:
    """The process that holds a run directory."""

    host: str
    pid: int
    job: str | None
    """SLURM job id."""
    boot_id: str
    """Changes when the host restarts."""
    process_start: str
    """Tells the process from a later one with the same pid."""
    started_at: str
    """For people; never compared."""
    token: str
    """Tells this hold from every other."""
    heartbeat: int = 0
    """Moves on every two seconds."""

    def __str__(self) -> str:
        job = f", job {self.job}" if self.job else ""
        return f"process {self.pid} on host {self.host}{job} (since {self.started_at})"

    @property
    def is_local(self) -> bool:
        """Whether the process belongs to this host, and can be looked up."""
        return self.host == socket.gethostname()

    @property
    def is_gone(self) -> bool:
        """Whether the process is known to be dead; False for one of another host."""
        return self.is_local and (self.boot_id != _boot_id() or self.process_start != _process_start(self.pid))


class RunLock:
    """Exclusive use of a run directory, which must exist.

    Args:
        run_dir: the directory.
        timeout: seconds to wait for another holder; 0: one attempt.
        work: hears at once, and then every few seconds, who is waited for; polled while waiting.
        on_lost: called from the heartbeat's thread, with a line for people, when another process
            has taken the lock over; by default that line is logged as an error.
    """

    def __init__(
        self, run_dir: Path, timeout: float, work: WorkContext = SILENT, on_lost: Callable[[str], None] = log.error
    ) -> None:
        self._run_dir, self._owner_path = run_dir, run_dir / OWNER_FILE
        self._timeout, self._work, self._on_lost = timeout, work, on_lost
        self._flock = FileLock(run_dir / LOCK_FILE, thread_local=False)
        self._seen: tuple[Owner | None, float] = None, 0.0
        self._held: Owner | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            RunLocked: another process held it all the time.
            Interrupted: the work was told to stop while waiting.
        """

        def holder() -> str:
            return _describe(read_owner(self._run_dir))

        if not self._work.wait_for("lock", self._attempt, self._timeout, lambda: f"waiting for {holder()}"):
            raise RunLocked(self._run_dir, holder(), self._timeout)
        self._stop.clear()
        self._thread = threading.Thread(target=self._beat, name="run-lock-heartbeat", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Give the lock back; harmless when it is not held, and in a process forked by the holder."""
        held, self._held = self._held, None
        if held is None or held.pid != os.getpid():
            return
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        found = read_owner(self._run_dir)
        if found is not None and found.token == held.token:
            self._owner_path.unlink(missing_ok=True)
        self._flock.release()

    def _attempt(self) -> bool:
        try:
            self._flock.acquire(timeout=0)
        except Timeout:
            return False
        try:
            self._held = self._claim() if self._is_vacant() else None
        finally:
            if self._held is None:
                self._flock.release()
        return self._held is not None

    def _is_vacant(self) -> bool:
        """With the flock in hand: remove the owner file if it is damaged or of the dead; whether none is left."""
        try:
            found = _read(self._owner_path)
        except FileNotFoundError:
            return True
        except ValueError:
            log.warning("%s is damaged, as a crash of the machine leaves it, and is replaced", self._owner_path)
            self._owner_path.unlink(missing_ok=True)
            return True
        if not (found.is_gone if found.is_local else self._stands_still(found)):
            return False
        log.info("taking over from %s", found)
        return self._remove(found)

    def _stands_still(self, owner: Owner) -> bool:
        """Whether the heartbeat of ``owner`` has not moved for ``STALE_SECONDS`` of this process's clock."""
        if owner != self._seen[0]:
            self._seen = owner, time.monotonic()
        return time.monotonic() - self._seen[1] >= STALE_SECONDS

    def _remove(self, dead: Owner) -> bool:
        """Remove the owner file of ``dead``, and no other's: another host may just have taken over.

        A rename takes the file whoever wrote it, exactly once; what came along is then looked at.
        """
        aside = self._owner_path.with_name(f"{OWNER_FILE}.{secrets.token_hex(8)}")
        try:
            self._owner_path.rename(aside)
        except FileNotFoundError:
            return True
        removed = read_owner(self._run_dir, aside.name)
        is_of_the_dead = removed is None or removed.token == dead.token
        if not is_of_the_dead:
            with suppress(FileExistsError):
                os.link(aside, self._owner_path)
        aside.unlink(missing_ok=True)
        return is_of_the_dead

    def _claim(self) -> Owner | None:
        """Write our owner file, unless another host is faster."""
        ours = _this_process()
        temporary = _write_aside(self._owner_path, ours)
        try:
            # Two hosts may both hold "the" flock; creating a link fails for the second of them.
            os.link(temporary, self._owner_path)
        except (FileExistsError, FileNotFoundError):
            return None
        except OSError:
            temporary.replace(self._owner_path)  # a file system without hard links
        finally:
            temporary.unlink(missing_ok=True)
        for torn in self._run_dir.glob(f"{OWNER_FILE}.*"):  # of holders killed while they wrote
            torn.unlink(missing_ok=True)
        return ours

    def _beat(self) -> None:
        ours = self._held
        while ours is not None and not self._stop.wait(HEARTBEAT_SECONDS):
            try:
                found = read_owner(self._run_dir)
                if found is not None and found.token != ours.token:
                    self._on_lost(f"{self._run_dir} was taken over by {found}, which saw no heartbeat of this process")
                    return
                ours = replace(ours, heartbeat=ours.heartbeat + 1)
                _write_aside(self._owner_path, ours).replace(self._owner_path)
            except OSError as error:
                log.warning("the lock's heartbeat could not be written: %s", error)


def live_runs(run_dirs: Iterable[Path]) -> set[Path]:
    """Return those of ``run_dirs`` that a live process holds.

    Only owner files are read, so nobody who acquires a lock is disturbed. Processes of this host are looked up;
    owners on other hosts are watched, all together, for two and a half heartbeats.
    """
    owners = {run_dir: owner for run_dir in run_dirs if (owner := read_owner(run_dir)) and not owner.is_gone}
    live = {run_dir for run_dir, owner in owners.items() if owner.is_local}
    deadline = time.monotonic() + 2.5 * HEARTBEAT_SECONDS
    while owners.keys() - live and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
        live |= {run_dir for run_dir in owners.keys() - live if read_owner(run_dir) not in {None, owners[run_dir]}}
    return live


def read_owner(run_dir: Path, name: str = OWNER_FILE) -> Owner | None:
    """Return the holder that the owner file of ``run_dir`` names; None when that is missing or unreadable."""
    try:
        return _read(run_dir / name)
    except (OSError, ValueError):
        return None


def _read(path: Path) -> Owner:
    """Raises ValueError when the file does not describe an owner; whatever lies there, it does not hang."""
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        content = file.read(_MAX_OWNER_BYTES)
    try:
        return Owner(**json.loads(content))
    except (TypeError, RecursionError) as error:
        raise ValueError(str(error)) from error


def _write_aside(path: Path, owner: Owner) -> Path:
    """Write ``owner`` to a temporary file beside ``path``; no fsync, since it need not survive the machine."""
    temporary = path.with_name(f"{path.name}.{owner.token}")
    temporary.write_text(json.dumps(asdict(owner)), encoding="utf-8")
    return temporary


def _describe(owner: Owner | None) -> str:
    if owner is None:
        return "a process that did not leave its name"
    return f"children of {owner}, which itself is gone" if owner.is_gone else str(owner)


def _this_process() -> Owner:
    return Owner(
        host=socket.gethostname(),
        pid=os.getpid(),
        job=os.environ.get("SLURM_JOB_ID"),
        boot_id=_boot_id(),
        process_start=str(_process_start(os.getpid())),
        started_at=datetime.now(UTC).isoformat(timespec="seconds"),
        token=secrets.token_hex(8),
    )


def _boot_id() -> str:
    """The kernel's name for the time since the host started; empty off Linux, where start times need none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _process_start(pid: int) -> str | None:
    """When the process started, in the kernel's own unit; None if there is no such process or it is a zombie."""
    try:
        if not sys.platform.startswith("linux"):
            return str(psutil.Process(pid).create_time())
        # The clock ticks since boot: psutil's create_time moves when the wall clock is set.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return None if fields[0] in {"Z", "X"} else fields[19]
    except (OSError, psutil.Error):
        return None
