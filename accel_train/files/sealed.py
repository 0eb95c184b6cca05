"""Directories that are complete or absent: written aside, digested, then renamed into place.

    <parent>/.tmp-<name>-<nonce>/      being written or removed, or left by a process that was killed
    <parent>/<name>/                   complete: the rename is the commit
    <parent>/.damaged-<name>-<nonce>/  found damaged, and set aside

Every sealed directory holds one JSON file, its seal, with the size and SHA-256 of each file and the digest of
the seal itself. Files that the seal does not name are ignored: what a file manager leaves behind damages nothing.
"""

from __future__ import annotations

import json
import secrets
import stat
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from accel_train.files.atomic import fsync_directory, fsync_file, sha256_file, sha256_json, write_atomic

TEMPORARY, DAMAGED = ".tmp-", ".damaged-"


class BrokenSeal(ValueError):
    """A seal that cannot be read, or whose content does not match its own digest."""


class NewerSeal(BrokenSeal):
    """A sound seal of a format that a newer version writes."""


def temporary_path(path: Path) -> Path:
    """Return a new name beside ``path`` for its content while that is incomplete."""
    return path.with_name(f"{TEMPORARY}{path.name}-{secrets.token_hex(4)}")


def seal(directory: Path, seal_file: str, header: Mapping[str, Any]) -> None:
    """Put every file in ``directory`` on disk, then the seal that vouches for them.

    Args:
        directory: all its files are written, in subdirectories too.
        seal_file: name of the seal.
        header: further fields of the seal, ``format_version`` among them.

    Raises:
        OSError: a file could not be written (disk full) or read.
    """
    files, found = {}, sorted(directory.rglob("*"))
    for path in found:
        if path.is_file() and path != directory / seal_file:
            fsync_file(path)
            name = path.relative_to(directory).as_posix()
            files[name] = {"size": path.stat().st_size, "sha256": sha256_file(path)}
    for path in found:
        if path.is_dir():
            fsync_directory(path)
    content: dict[str, Any] = {**header, "files": files}
    content["self_sha256"] = sha256_json(content)
    # No newline at the end: every truncation makes it invalid JSON.
    write_atomic(directory / seal_file, json.dumps(content, indent=1, sort_keys=True).encode())


def commit(temporary: Path, path: Path) -> None:
    """Rename a sealed directory to ``path``; the new name is on disk on return.

    Raises:
        OSError: ``path`` exists already, or the file system refuses.
    """
    temporary.rename(path)
    fsync_directory(path.parent)


def read_seal(directory: Path, seal_file: str, format_version: int) -> dict[str, Any]:
    """Return the seal of ``directory`` without ``self_sha256``; its own digest and its ``files`` are verified.

    Args:
        directory: a sealed directory.
        seal_file: name of the seal.
        format_version: the only version that is understood.

    Raises:
        NewerSeal: the seal is sound and of a newer format.
        BrokenSeal: it is missing, damaged, or of another format.
    """
    path = directory / seal_file
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        stated = content.pop("self_sha256")
        digest = sha256_json(content)
    except OSError as error:
        raise BrokenSeal(f"{path} cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise BrokenSeal(f"{path} is damaged ({error!r})") from error
    if digest != stated:
        raise BrokenSeal(f"{path} does not match its own digest")
    version = content.get("format_version")
    if isinstance(version, int) and version > format_version:
        raise NewerSeal(f"{directory} has format {version}; this version reads up to {format_version}")
    if version != format_version:
        raise BrokenSeal(f"{path} has no usable field 'format_version'")
    files = content.get("files")
    if not isinstance(files, dict) or not all(_is_entry(*item) for item in files.items()):
        raise BrokenSeal(f"{path} has no usable field 'files'")
    return content


def damaged_files(directory: Path, files: Mapping[str, Mapping[str, Any]], *, full: bool = True) -> list[str]:
    """Return what is wrong with the files of ``directory``, one line each; an empty list when nothing is.

    Args:
        directory: a sealed directory.
        files: the field of that name in its seal.
        full: read every byte and compare digests; otherwise compare sizes alone.
    """
    # hashlib releases the interpreter's lock, so files are digested side by side.
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda name: _problem(directory, name, files[name], full), files)
        return [problem for problem in found if problem is not None]


def leftovers(parent: Path) -> list[tuple[str, Path]]:
    """Return ``(name, path)`` of every temporary directory in ``parent``, where ``name`` is that of the complete one.

    Each belongs to a live process or to one that was killed; the caller's lock tells which.
    """
    found = sorted(parent.glob(f"{TEMPORARY}*"))
    return [(path.name.removeprefix(TEMPORARY).rpartition("-")[0], path) for path in found]


def retire(path: Path) -> Path:
    """Rename a directory that is to be removed and return its temporary name.

    A process that is killed during the removal then leaves no half-empty directory under a valid name.
    """
    return path.rename(temporary_path(path))


def set_aside(path: Path) -> None:
    """Rename a damaged directory, so that people can look at it and nothing uses it."""
    path.rename(path.with_name(f"{DAMAGED}{path.name}-{secrets.token_hex(4)}"))


def _is_entry(name: str, entry: object) -> bool:
    """Whether ``name`` stays inside the directory and ``entry`` has the fields that are compared."""
    is_inside = not name.startswith("/") and ".." not in name.split("/") and "\0" not in name
    return is_inside and isinstance(entry, dict) and {"size", "sha256"} <= entry.keys()


def _problem(directory: Path, name: str, expected: Mapping[str, Any], full: bool) -> str | None:
    file = directory / name
    try:
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):
            return f"{name} is not a file"
        if status.st_size != expected["size"]:
            return f"{name} has {status.st_size} bytes instead of {expected['size']}"
        if full and sha256_file(file) != expected["sha256"]:
            return f"{name} does not match its SHA-256"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    return None
