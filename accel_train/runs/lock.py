"""The lock of a run directory: one live process at a time, across hosts, and no wait for the dead.

Two layers. An flock, which the kernel frees when its last holder dies; and an owner file with
a heartbeat counter, which says who that is, and holds where flock does not reach other hosts.
A counter is judged by whether it moves on the waiter's own monotonic clock: wall clocks of
different hosts are never compared. The price is ``stale_after`` seconds of waiting before a
dead process of another host gives way.

A process forked by the holder may keep the flock until it exits (data-loading workers outlive
a killed parent by seconds), so a lock of the dead is waited for like one of the living. A
process started by exec never inherits it.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

import psutil
from filelock import FileLock, Timeout

from accel_train.errors import RunLocked
from accel_train.process.work import never, wait_for

LOCK_FILE = ".lock"
OWNER_FILE = ".lock-owner.json"
HEARTBEAT_SECONDS = 2.0
_POLL_SECONDS = 0.1
_REPORT_SECONDS = 5.0

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Owner:
    """Who holds a run directory."""

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
    def is_gone(self) -> bool:
        """Whether the process is known to be dead; False for one of another host."""
        if self.host != socket.gethostname():
            return False
        return self.boot_id != _boot_id() or self.process_start != _process_start(self.pid)


class RunLock:
    """Exclusive use of a run directory, which must exist.

    Args:
        run_dir: the directory.
        timeout: seconds to wait for another holder; 0: one attempt.
        stale_after: seconds without a heartbeat after which another host's hold has ended.
        on_wait: called with a line for people at once and then every few seconds while waiting;
            what it raises ends the wait.
        should_stop: polled while waiting.
        on_lost: called from the heartbeat's thread, with a line for people, when another process
            has taken the lock over.
    """

    def __init__(
        self,
        run_dir: Path,
        timeout: float = 60.0,
        stale_after: float = 30.0,
        on_wait: Callable[[str], None] | None = None,
        should_stop: Callable[[], bool] = never,
        on_lost: Callable[[str], None] | None = None,
    ) -> None:
        self.run_dir = run_dir
        self._timeout, self._on_wait, self._should_stop = timeout, on_wait, should_stop
        self._on_lost = on_lost
        self._flock = FileLock(run_dir / LOCK_FILE, thread_local=False)
        self._watch = _HeartbeatWatch(stale_after)
        self._held: Owner | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            RunLocked: another process held it all the time.
            Interrupted: ``should_stop()`` turned true while waiting.
        """
        held = wait_for(
            self._attempt,
            self._timeout,
            lambda: f"waiting for {_describe(self.owner())}",
            on_wait=self._on_wait,
            should_stop=self._should_stop,
        )
        if not held:
            raise RunLocked(self.run_dir, _describe(self.owner()), self._timeout)
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
        found = self.owner()
        if found is not None and found.token == held.token:
            self._owner_path.unlink(missing_ok=True)
        self._flock.release()

    def owner(self) -> Owner | None:
        """The holder that the owner file names, if any."""
        return read_owner(self.run_dir)

    def __enter__(self) -> RunLock:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    @property
    def _owner_path(self) -> Path:
        return self.run_dir / OWNER_FILE

    def _attempt(self) -> bool:
        try:
            self._flock.acquire(timeout=0)
        except Timeout:
            return False
        try:
            if self._claim():
                return True
        except BaseException:
            self._flock.release()
            raise
        self._flock.release()
        return False

    def _claim(self) -> bool:
        """With the flock in hand: put our owner file in the place of none or a dead one's."""
        try:
            found = _parse_owner(self._owner_path.read_bytes())
            if not found.is_gone and not self._watch.stands_still(found):
                return False
            log.info("taking over from %s", found)
            if not self._remove(found):
                return False
        except FileNotFoundError:
            pass
        except ValueError:
            log.warning("%s is damaged, as a crash of the machine leaves it, and is replaced", self._owner_path)
            self._owner_path.unlink(missing_ok=True)
        ours = _this_process()
        temporary = _write_aside(self._owner_path, ours)
        try:
            # Two hosts may both hold "the" flock; creating a link fails for the second of them.
            os.link(temporary, self._owner_path)
        except (FileExistsError, FileNotFoundError):
            return False
        except OSError:
            temporary.replace(self._owner_path)  # a file system without hard links
        finally:
            temporary.unlink(missing_ok=True)
        for leaving in self.run_dir.glob(f"{OWNER_FILE}.*"):  # of holders killed while they wrote
            leaving.unlink(missing_ok=True)
        self._held = ours
        return True

    def _remove(self, dead: Owner) -> bool:
        """Remove the owner file of ``dead``, and no other's: another host may just have taken over.

        A rename takes the file whoever wrote it, exactly once; what came along is then looked at.
        """
        aside = self._owner_path.with_name(f"{OWNER_FILE}.{secrets.token_hex(8)}")
        try:
            self._owner_path.rename(aside)
        except FileNotFoundError:
            return True
        removed = read_owner_file(aside)
        ours_to_remove = removed is None or removed.token == dead.token
        if not ours_to_remove:
            with suppress(FileExistsError):
                os.link(aside, self._owner_path)
        aside.unlink(missing_ok=True)
        return ours_to_remove

    def _beat(self) -> None:
        ours = self._held
        while ours is not None and not self._stop.wait(HEARTBEAT_SECONDS):
            try:
                found = self.owner()
                if found is not None and found.token != ours.token:
                    message = f"{self.run_dir} was taken over by {found}, which saw no heartbeat of this process"
                    log.error("%s", message)
                    if self._on_lost is not None:
                        self._on_lost(message)
                    return
                ours = replace(ours, heartbeat=ours.heartbeat + 1)
                _write_aside(self._owner_path, ours).replace(self._owner_path)
            except OSError as error:
                log.warning("the lock's heartbeat could not be written: %s", error)


class _HeartbeatWatch:
    """Says when a counter has stood still for ``seconds`` on this process's monotonic clock."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._seen: tuple[str, int] | None = None
        self._since = 0.0

    def stands_still(self, owner: Owner) -> bool:
        seen = (owner.token, owner.heartbeat)
        if seen != self._seen:
            self._seen, self._since = seen, time.monotonic()
        return time.monotonic() - self._since >= self._seconds


def live_runs(run_dirs: Iterable[Path]) -> set[Path]:
    """Those of ``run_dirs`` that a live process holds.

    Only owner files are read, so nobody who acquires a lock is disturbed. Processes of this host
    are looked up; owners on other hosts are watched, all together, for two heartbeats at most.
    """
    live: set[Path] = set()
    watched: dict[Path, Owner] = {}
    for run_dir in run_dirs:
        owner = read_owner(run_dir)
        if owner is None or owner.is_gone:
            continue
        if owner.host == socket.gethostname():
            live.add(run_dir)
        else:
            watched[run_dir] = owner
    deadline = time.monotonic() + 2.5 * HEARTBEAT_SECONDS
    while watched and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
        moved = {run_dir for run_dir, owner in watched.items() if read_owner(run_dir) not in {None, owner}}
        live |= moved
        watched = {run_dir: owner for run_dir, owner in watched.items() if run_dir not in moved}
    return live


def read_owner(run_dir: Path) -> Owner | None:
    """The holder that the owner file of ``run_dir`` names; None without one, or when it is unreadable."""
    return read_owner_file(run_dir / OWNER_FILE)


def read_owner_file(path: Path) -> Owner | None:
    """The holder that an owner file names; None when it is missing or unreadable."""
    try:
        return _parse_owner(path.read_bytes())
    except (OSError, ValueError):
        return None


def _parse_owner(content: bytes) -> Owner:
    """Raises ValueError when ``content`` does not describe an owner."""
    try:
        return Owner(**json.loads(content))
    except TypeError as error:
        raise ValueError(str(error)) from error


def _describe(owner: Owner | None) -> str:
    if owner is None:
        return "a process that did not leave its name"
    if owner.is_gone:
        return f"children of {owner}, which itself is gone"
    return str(owner)


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


def _write_aside(path: Path, owner: Owner) -> Path:
    """Write ``owner`` to a temporary file beside ``path``; no fsync, since it need not survive the machine."""
    temporary = path.with_name(f"{path.name}.{owner.token}")
    temporary.write_text(json.dumps(asdict(owner)), encoding="utf-8")
    return temporary


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return str(int(psutil.boot_time()))


def _process_start(pid: int) -> str | None:
    """When the process started, in the kernel's own unit; None if there is no such process or it is a zombie."""
    try:
        # The clock ticks since boot: psutil's create_time moves when the wall clock is set.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return None if fields[0] in {"Z", "X"} else fields[19]
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
    try:
        return str(psutil.Process(pid).create_time())
    except psutil.Error:
        return None
