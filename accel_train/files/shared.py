"""Shared artifacts (corpora): built once, by whoever comes first, verified by everyone else.

    <root>/<key>/            the artifact's files and index.json with the size and SHA-256 of each
    <root>/.<key>.lock       held while one process verifies or builds
    <root>/.tmp-<key>-<id>/  being built, or a dead builder's leavings

The rename of the finished temporary directory is the commit, so an artifact that has its name
is complete. Every opening reads all bytes once to verify them: for the corpora of this project
that is a fraction of a second, and a flipped bit is rebuilt instead of trained on.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from accel_train.files.atomic import fsync_directory, fsync_file, sha256_file, write_atomic
from accel_train.process.fault_points import CORPUS_BEGUN, CORPUS_BUILT, SILENT, Observer
from accel_train.process.work import never, wait_for

INDEX_FILE = "index.json"
_FORMAT_VERSION = 1
_TEMPORARY = ".tmp-"

log = logging.getLogger(__name__)


def cached(
    root: Path,
    key: str,
    build: Callable[[Path], None],
    *,
    lock_timeout: float = 3600.0,
    on_wait: Callable[[str], None] | None = None,
    should_stop: Callable[[], bool] = never,
    observer: Observer = SILENT,
) -> Path:
    """The directory ``root / key``, built if it is missing or damaged.

    Args:
        root: directory of the shared artifacts; created if missing.
        key: names the artifact by everything that defines it.
        build: writes the artifact's files into the empty directory that it is given.
        lock_timeout: seconds to wait while another process builds or verifies this artifact.
        on_wait: receives a line for people while waiting.
        should_stop: polled while waiting.
        observer: hears when building begins and when the files are written.

    Raises:
        TimeoutError: another process held the artifact's lock all the time.
        Interrupted: ``should_stop()`` turned true while waiting.
        ValueError: ``key`` cannot be a directory name.
        OSError: the artifact could not be written (disk full, not writable); says where and how much is free.
        Exception: whatever else ``build`` raises; nothing half-built is left.
    """
    if not key or key.startswith(".") or "/" in key:
        raise ValueError(f"key: {key!r} cannot name a directory")
    root.mkdir(parents=True, exist_ok=True)
    lock = _lock(root, key)

    def attempt() -> bool:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return False
        return True

    what = f"waiting for another process that builds or verifies {root / key}"
    if not wait_for(attempt, lock_timeout, lambda: what, on_wait=on_wait, should_stop=should_stop):
        raise TimeoutError(f"{root / key} was locked by another process for {lock_timeout:.0f} s")
    try:
        _sweep(root, key)
        return _open_or_build(root, key, build, observer)
    finally:
        lock.release()


def damage(directory: Path) -> str | None:
    """What is wrong with an artifact, or None: every file is hashed."""
    try:
        index = json.loads((directory / INDEX_FILE).read_text(encoding="utf-8"))
        expected: dict[str, Any] = dict(index["files"])
    except OSError as error:
        return f"{INDEX_FILE} cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError):
        return f"{INDEX_FILE} is damaged"
    if index.get("format_version") != _FORMAT_VERSION:
        return f"{INDEX_FILE} has format version {index.get('format_version')!r}, not {_FORMAT_VERSION}"
    # Files that are not in it are nobody's: what a file manager leaves behind damages nothing.
    for name, entry in expected.items():
        if not (directory / name).is_file():
            return f"{name} is missing"
        if _entry(directory / name) != entry:
            return f"{name} does not have the recorded size and SHA-256"
    return None


def _open_or_build(root: Path, key: str, build: Callable[[Path], None], observer: Observer) -> Path:
    final = root / key
    if final.exists():
        problem = damage(final)
        if problem is None:
            return final
        log.warning("%s is damaged (%s) and is built again", final, problem)
        # Under a temporary name first: a kill in the middle of the removal must not leave half of it.
        doomed = _temporary(root, key)
        final.rename(doomed)
        shutil.rmtree(doomed)
    temporary = _temporary(root, key)
    temporary.mkdir()
    try:
        observer.reached(CORPUS_BEGUN)
        build(temporary)
        observer.reached(CORPUS_BUILT)
        _seal(temporary, key)
        _publish(temporary, final)
    except OSError as error:
        free = shutil.disk_usage(root).free
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(f"{final} could not be built ({free / 1e6:.0f} MB free): {error}") from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_directory(root)
    return final


def _publish(temporary: Path, final: Path) -> None:
    """The commit. Where the lock does not reach another host, that host's artifact may be there first."""
    try:
        temporary.rename(final)
    except OSError:
        if damage(final) is not None:
            raise
        shutil.rmtree(temporary)


def _seal(directory: Path, key: str) -> None:
    """Put everything on disk, then write the index."""
    files = sorted(_files(directory))
    for path in files:
        fsync_file(path)
    index = {
        "format_version": _FORMAT_VERSION,
        "key": key,
        "files": {_name(directory, path): _entry(path) for path in files},
    }
    for path in directory.rglob("*"):
        if path.is_dir():
            fsync_directory(path)
    write_atomic(directory / INDEX_FILE, json.dumps(index, indent=1).encode())


def _files(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file() and path != directory / INDEX_FILE]


def _name(directory: Path, path: Path) -> str:
    return path.relative_to(directory).as_posix()


def _entry(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": sha256_file(path)}


def _temporary(root: Path, key: str) -> Path:
    return root / f"{_TEMPORARY}{key}-{os.getpid()}_{secrets.token_hex(4)}"


def _lock(root: Path, key: str) -> FileLock:
    return FileLock(root / f".{key}.lock", thread_local=False)


def _sweep(root: Path, locked_key: str) -> None:
    """Remove the leavings of dead builders: a temporary directory whose key nobody has locked."""
    for directory in root.glob(f"{_TEMPORARY}*"):
        key = directory.name.removeprefix(_TEMPORARY).rpartition("-")[0]
        if key == locked_key:
            shutil.rmtree(directory, ignore_errors=True)
            continue
        lock = _lock(root, key)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            continue
        try:
            shutil.rmtree(directory, ignore_errors=True)
        finally:
            lock.release()
