"""Directories that many runs share (corpora): built once by the first, verified by all others.

    <root>/<key>/         a sealed directory, see :mod:`accel_train.files.sealed`
    <root>/.<key>.lock    held while one process verifies or builds it

Opening reads every byte: for the corpora of this project that takes a fraction of a second, and a
flipped bit is rebuilt instead of trained on.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from accel_train.files import sealed
from accel_train.process.fault_points import CORPUS_BEGUN, CORPUS_BUILT
from accel_train.process.work import SILENT, WorkContext

INDEX_FILE = "index.json"
_FORMAT_VERSION = 1
_LOCK_SECONDS = 3600.0

log = logging.getLogger(__name__)


def cached(
    root: Path, key: str, build: Callable[[Path], None], work: WorkContext = SILENT, phase: str = "corpus"
) -> Path:
    """Return the directory ``root / key``, and build it first if it is missing or damaged.

    Args:
        root: directory of everything that is shared; created if missing.
        key: name made from everything that defines the content.
        build: writes the files into the empty directory that it is given.
        work: hears of waiting, asks for a stop while waiting, and hears of the fault points.
        phase: under which waiting is reported.

    Raises:
        TimeoutError: another process held the lock for an hour.
        Interrupted: ``work`` was told to stop while waiting.
        ValueError: ``key`` cannot be a directory name.
        OSError: the directory could not be written (disk full, not writable); names it and the free space.
        Exception: whatever else ``build`` raises; nothing half-built is left.
    """
    if not key or key.startswith(".") or "/" in key:
        raise ValueError(f"key: {key!r} cannot name a directory")
    root.mkdir(parents=True, exist_ok=True)
    lock = _lock(root, key)
    whom = f"waiting for another process that builds or verifies {root / key}"
    if not work.wait_for(phase, lambda: _is_acquired(lock), _LOCK_SECONDS, lambda: whom):
        raise TimeoutError(f"{root / key} was locked by another process for {_LOCK_SECONDS:.0f} s")
    try:
        _sweep(root, key)
        return _open_or_build(root / key, build, work)
    finally:
        lock.release()


def damage(directory: Path) -> str | None:
    """Return what is wrong with a shared directory, or None; every file is hashed."""
    try:
        index = sealed.read_seal(directory, INDEX_FILE, _FORMAT_VERSION)
    except sealed.BrokenSeal as error:
        return str(error)
    return "; ".join(sealed.damaged_files(directory, index["files"])) or None


def _open_or_build(path: Path, build: Callable[[Path], None], work: WorkContext) -> Path:
    if path.exists():
        if (problem := damage(path)) is None:
            return path
        log.warning("%s is damaged (%s) and is built again", path, problem)
        shutil.rmtree(sealed.retire(path))
    temporary = sealed.temporary_path(path)
    temporary.mkdir()
    try:
        work.reached(CORPUS_BEGUN)
        build(temporary)
        work.reached(CORPUS_BUILT)
        sealed.seal(temporary, INDEX_FILE, {"format_version": _FORMAT_VERSION, "key": path.name})
        _commit(temporary, path)
    except OSError as error:
        free = shutil.disk_usage(path.parent).free
        raise OSError(f"{path} could not be built ({free / 1e6:.0f} MB free): {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return path


def _commit(temporary: Path, path: Path) -> None:
    """Rename into place, unless another host, which the lock does not reach, was first with a sound one."""
    try:
        sealed.commit(temporary, path)
    except OSError:
        if damage(path) is not None:
            raise


def _lock(root: Path, key: str) -> FileLock:
    return FileLock(root / f".{key}.lock", thread_local=False)


def _is_acquired(lock: FileLock) -> bool:
    with suppress(Timeout):
        lock.acquire(timeout=0)
    return lock.is_locked


def _sweep(root: Path, held_key: str) -> None:
    """Remove what killed builders left: temporary directories whose key no other process has locked."""
    for key, leftover in sealed.leftovers(root):
        lock = _lock(root, key)
        if key == held_key or _is_acquired(lock):
            shutil.rmtree(leftover, ignore_errors=True)
            lock.release()
