"""Files that survive a crash: digests, fsync, and writes that are complete or absent.

The temporary file of an atomic write has a fixed name, so a writer that is killed again and
again leaves at most one behind; the price is that every path has one writer at a time.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def sha256_file(path: Path) -> str:
    """Return the SHA-256 (hex) of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Return the SHA-256 (hex) of a JSON value, written with sorted keys and no spaces: equal values give equal text.

    Raises:
        ValueError: ``value`` holds a number that is not finite.
        TypeError: it holds something that JSON has no form for.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def fsync_file(path: Path) -> None:
    """Force a file's content to disk."""
    _fsync(path, os.O_RDONLY)


def fsync_directory(path: Path) -> None:
    """Force a directory's entries (creations, renames, removals) to disk."""
    _fsync(path, os.O_RDONLY | os.O_DIRECTORY)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Make an ``OSError`` raised inside name ``path``: one from a write to a full disk names no file by itself."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def write_atomic(path: Path, content: bytes, *, written_aside: Callable[[], None] | None = None) -> None:
    """Replace ``path`` by ``content``: readers and crashes see the old file or the new one, never a part.

    A path has one writer at a time (the lock of the run directory ensures that).

    Args:
        path: the file.
        content: the whole new content.
        written_aside: called when the new file is complete and has not taken its place.

    Raises:
        OSError: the disk is full or the directory is not writable; names the file; the old one is intact.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with naming(path), temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if written_aside is not None:
            written_aside()
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)


def _fsync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
