"""What a committed checkpoint looks like from outside: its name, its manifest, whether it is sound.

    checkpoints/step_0001250/                 committed: complete by construction
    checkpoints/.tmp-step_0001250-<nonce>/    being written, or a dead writer's leavings
    checkpoints/.damaged-step_0001250-<nonce>/  found damaged, and set aside

The manifest holds the size and SHA-256 of every file and its own digest. Needs no torch, so that
listing checkpoints is quick.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import secrets
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from accel_train.config.sections import canonical_json
from accel_train.errors import CheckpointError, NewerFormat
from accel_train.files.atomic import fsync_directory, fsync_file, sha256_file

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
TEMPORARY, DAMAGED = ".tmp-", ".damaged-"
_STEP_DIRECTORY = re.compile(r"step_(\d+)")
_FIELDS: dict[str, type] = {
    "format_version": int,
    "step": int,
    "epoch": int,
    "world_size": int,
    "config_hash": str,
    "files": dict,
    "rng": list,
}


def step_directory(step: int) -> str:
    """Name of the checkpoint of ``step``."""
    return f"step_{step:07d}"


def list_checkpoints(directory: Path) -> list[tuple[int, Path]]:
    """``(step, path)`` of every committed checkpoint, oldest first; nothing is verified."""
    if not directory.is_dir():
        return []
    found = ((_STEP_DIRECTORY.fullmatch(path.name), path) for path in directory.iterdir())
    return sorted((int(match.group(1)), path) for match, path in found if match)


def write_manifest(path: Path, header: Mapping[str, Any]) -> None:
    """Put every file of checkpoint ``path`` on disk, then the manifest that vouches for them.

    Args:
        path: the checkpoint's directory, all its files written.
        header: every field of the manifest but ``format_version``, ``files`` and ``self_sha256``.
    """
    files = {}
    for file in sorted(path.iterdir()):
        fsync_file(file)
        files[file.name] = {"size": file.stat().st_size, "sha256": sha256_file(file)}
    manifest: dict[str, Any] = {"format_version": FORMAT_VERSION, "files": files, **header}
    manifest["self_sha256"] = _digest(manifest)
    # No newline at the end: every truncation makes it invalid JSON.
    (path / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True), encoding="utf-8")
    fsync_file(path / MANIFEST)
    fsync_directory(path)


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of checkpoint ``path``, its own digest verified.

    Raises:
        CheckpointError: it is missing, damaged, or of a newer format.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        stated = manifest.pop("self_sha256")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path / MANIFEST} cannot be read: {error!r}") from error
    if _digest(manifest) != stated:
        raise CheckpointError(f"{path / MANIFEST} does not match its own digest")
    version = manifest.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise NewerFormat(
            f"{path} has checkpoint format {version}; this version reads up to {FORMAT_VERSION}: update accel_train"
        )
    for name, kind in _FIELDS.items():
        if not isinstance(manifest.get(name), kind):
            raise CheckpointError(f"{path / MANIFEST} has no usable field {name!r}")
    return dict(manifest)


def require_data(saved: Mapping[str, str], here: Mapping[str, str], step: int, cure: str) -> None:
    """Refuse a checkpoint that saw other data.

    Args:
        saved: SHA-256 (hex) of what the checkpoint's data is made of, by name.
        here: the same of the data at hand.
        step: of the checkpoint.
        cure: what the user can do about it.

    Raises:
        CheckpointError: names both digests.
    """
    for name, digest in here.items():
        if saved.get(name) != digest:
            raise CheckpointError(
                f"the checkpoint of step {step} was trained on the {name} with SHA-256 {saved.get(name)}, here is the "
                f"{name} with SHA-256 {digest}; put the former back, or {cure}"
            )


def require_configuration(path: Path, config_hash: str, cure: str) -> None:
    """Refuse checkpoint ``path`` unless it was written under the configuration with this hash.

    Args:
        path: the checkpoint's directory.
        config_hash: of the run that wants to use it.
        cure: what the user may do about it.

    Raises:
        CheckpointError: it belongs to another configuration.
    """
    theirs = read_manifest(path)["config_hash"]
    if theirs != config_hash:
        raise CheckpointError(f"{path} was written under configuration {theirs[:8]}, this is {config_hash[:8]}; {cure}")


def verify(path: Path, *, full: bool = True) -> list[str]:
    """What is wrong with checkpoint ``path``; empty when it is sound.

    Args:
        path: the checkpoint's directory.
        full: read every byte and compare digests; otherwise only sizes are compared.

    Raises:
        NewerFormat: a newer version wrote it.
    """
    try:
        manifest = read_manifest(path)
    except NewerFormat:
        raise
    except CheckpointError as error:
        return [str(error)]
    named = _STEP_DIRECTORY.fullmatch(path.name)
    if named and int(named[1]) != manifest["step"]:
        # Rotation and resume go by the name: a later one would push newer checkpoints out.
        return [f"{MANIFEST} is of step {manifest['step']}"]
    files = manifest["files"]
    # hashlib lets go of the interpreter's lock, so files are digested side by side.
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda name: _problem(path / name, files[name], full), files)
        return [problem for problem in found if problem is not None]


def _problem(file: Path, expected: Mapping[str, Any], full: bool) -> str | None:
    try:
        size = file.stat().st_size
        if size != expected["size"]:
            return f"{file.name} has {size} bytes instead of {expected['size']}"
        if full and sha256_file(file) != expected["sha256"]:
            return f"{file.name} does not match its SHA-256"
    except FileNotFoundError:
        return f"{file.name} is missing"
    except OSError as error:
        return f"{file.name} cannot be read ({error.strerror})"
    return None


@dataclass(frozen=True)
class Found:
    """A checkpoint as it was found on disk."""

    name: str
    step: int | None
    """None, like the next two, when the manifest cannot be read."""
    epoch: int | None
    world_size: int | None
    """Number of processes that wrote it."""
    size: int
    """Bytes of all its files."""
    written_at: str | None
    """Time in UTC of the manifest's last change; None without one."""
    problems: list[str]
    """What is wrong with it; empty when nothing was found."""
    set_aside: bool
    """An earlier launch found it damaged and does not use it any more."""


def survey(directory: Path, *, full: bool = False) -> list[Found]:
    """Every checkpoint in ``directory``, oldest step first, those set aside last.

    Args:
        directory: ``checkpoints/`` of a run directory; may be missing.
        full: read every byte and compare digests; otherwise only sizes are compared.
    """
    committed = [_look_at(path, full) for _, path in list_checkpoints(directory)]
    return committed + [_look_at(path, full) for path in sorted(directory.glob(f"{DAMAGED}*"))]


def _look_at(path: Path, full: bool) -> Found:
    try:
        manifest = read_manifest(path)
        problems = verify(path, full=full)
    except CheckpointError as error:
        manifest, problems = {}, [str(error)]
    try:
        written = datetime.fromtimestamp((path / MANIFEST).stat().st_mtime, UTC).isoformat(timespec="seconds")
    except OSError:
        written = None
    return Found(
        name=path.name,
        step=manifest.get("step"),
        epoch=manifest.get("epoch"),
        world_size=manifest.get("world_size"),
        size=sum(file.stat().st_size for file in path.iterdir()),
        written_at=written,
        problems=problems,
        set_aside=path.name.startswith(DAMAGED),
    )


def newest_sound(directory: Path, *, full: bool = True, set_aside: bool = False, restart: bool = False) -> Path | None:
    """The newest checkpoint that verifies; damaged newer ones are named in a warning.

    Args:
        directory: ``checkpoints/`` of a run directory.
        full: compare digests, not sizes alone.
        set_aside: rename damaged ones; only the run that holds the lock may.
        restart: when every one is damaged, set them aside and return None.

    Raises:
        CheckpointError: there are checkpoints, but every one is damaged.
        NewerFormat: the newest was written by a newer version.
    """
    damaged: dict[Path, str] = {}
    for _, path in reversed(list_checkpoints(directory)):
        problems = verify(path, full=full)
        if problems:
            damaged[path] = "; ".join(problems)
            log.warning("damaged checkpoint %s: %s", path.name, damaged[path])
            continue
        # Only now: as long as none is sound, every launch must find them all and refuse to start over.
        _set_aside(damaged if set_aside else ())
        return path
    if damaged and not restart:
        found = " | ".join(f"{path.name}: {problems}" for path, problems in damaged.items())
        raise CheckpointError(
            f"every checkpoint in {directory} is damaged ({found}); restore one from a backup, start over from step 0 "
            "with --on_damage restart, or archive the run and start over with --fresh"
        )
    if damaged:
        _set_aside(damaged)
        log.warning("every checkpoint is damaged: they are set aside and training starts over at step 0")
    return None


def _set_aside(damaged: Mapping[Path, str] | tuple[()]) -> None:
    for path in damaged:
        path.rename(path.with_name(f"{DAMAGED}{path.name}-{secrets.token_hex(4)}"))


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical_json(manifest).encode()).hexdigest()
