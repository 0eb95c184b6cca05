"""Committed checkpoints seen from outside: their names, their manifests, and whether they are sound.

    checkpoints/step_0001250/                   committed, see :mod:`accel_train.files.sealed`
    checkpoints/.damaged-step_0001250-<nonce>/  found damaged, and set aside

The manifest is the seal of a checkpoint: it holds the size and SHA-256 of every file and its own
digest. The module needs no torch, so that listing checkpoints is quick.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from accel_train.errors import CheckpointError, CheckpointMismatch, CheckpointsDamaged, NewerFormat
from accel_train.files.sealed import DAMAGED, BrokenSeal, NewerSeal, damaged_files, read_seal, seal, set_aside

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
_STEP_DIRECTORY = re.compile(r"step_(\d+)")
_FIELDS: dict[str, type] = {"step": int, "epoch": int, "world_size": int, "config_hash": str, "rng": list}


def step_directory(step: int) -> str:
    """Return the name of the checkpoint of ``step``."""
    return f"step_{step:07d}"


def list_checkpoints(directory: Path) -> list[tuple[int, Path]]:
    """Return ``(step, path)`` of every committed checkpoint, oldest first; nothing is verified."""
    if not directory.is_dir():
        return []
    found = ((_STEP_DIRECTORY.fullmatch(path.name), path) for path in directory.iterdir())
    return sorted((int(match.group(1)), path) for match, path in found if match)


def write_manifest(path: Path, header: Mapping[str, Any]) -> None:
    """Put every file of checkpoint ``path`` on disk, then the manifest that vouches for them.

    Args:
        path: the checkpoint's directory, all its files written.
        header: every field of the manifest but ``format_version``, ``files`` and ``self_sha256``.

    Raises:
        OSError: the disk is full, or a file cannot be read.
    """
    seal(path, MANIFEST, {"format_version": FORMAT_VERSION, **header})


def read_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest of checkpoint ``path`` without ``self_sha256``; its own digest is verified.

    Raises:
        NewerFormat: a newer version wrote it.
        CheckpointError: it is missing or damaged.
    """
    try:
        manifest = read_seal(path, MANIFEST, FORMAT_VERSION)
    except NewerSeal as error:
        raise NewerFormat(f"checkpoint {error}: update accel_train") from error
    except BrokenSeal as error:
        raise CheckpointError(str(error)) from error
    for name, kind in _FIELDS.items():
        if not isinstance(manifest.get(name), kind):
            raise CheckpointError(f"{path / MANIFEST} has no usable field {name!r}")
    return manifest


def require_data(saved: Mapping[str, str], present: Mapping[str, str], step: int, cure: str) -> None:
    """Refuse a checkpoint that saw other data.

    Args:
        saved: SHA-256 (hex) of what the checkpoint's data is made of, by name.
        present: the same of the data at hand.
        step: of the checkpoint.
        cure: what the user can do about it.

    Raises:
        CheckpointMismatch: names both digests.
    """
    for name, digest in present.items():
        if saved.get(name) != digest:
            raise CheckpointMismatch(
                f"the checkpoint of step {step} was trained on the {name} with SHA-256 {saved.get(name)}, here is the "
                f"{name} with SHA-256 {digest}; put the former back, or {cure}"
            )


def require_configuration(path: Path, config_hash: str, cure: str) -> None:
    """Refuse checkpoint ``path`` unless it was written under the configuration with this hash.

    Args:
        path: the checkpoint's directory.
        config_hash: of the run that wants to use it.
        cure: what the user can do about it.

    Raises:
        CheckpointMismatch: it belongs to another configuration.
        CheckpointError: its manifest is damaged.
    """
    theirs = read_manifest(path)["config_hash"]
    if theirs != config_hash:
        raise CheckpointMismatch(
            f"{path} was written under configuration {theirs[:8]}, this is {config_hash[:8]}; {cure}"
        )


def verify(path: Path, *, full: bool = True) -> list[str]:
    """Return what is wrong with checkpoint ``path``; an empty list when it is sound.

    Args:
        path: the checkpoint's directory.
        full: read every byte and compare digests; otherwise compare sizes alone.

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
    return damaged_files(path, manifest["files"], full=full)


@dataclass(frozen=True)
class Found:
    """A checkpoint as it lies on disk."""

    name: str
    step: int | None
    """From the manifest, as the next two; None when it cannot be read."""
    epoch: int | None
    world_size: int | None
    """Number of processes that wrote it."""
    size: int
    """Bytes of all its files."""
    written_at: str | None
    """Time in UTC (ISO 8601) of the manifest's last change; None without one."""
    problems: list[str]
    """As :func:`verify` returns them."""
    set_aside: bool
    """An earlier launch found it damaged; no launch uses it any more."""


def survey(directory: Path, *, full: bool = False) -> list[Found]:
    """Return every checkpoint in ``directory``, oldest step first, those set aside last.

    Args:
        directory: ``checkpoints/`` of a run directory; may be missing.
        full: read every byte and compare digests; otherwise compare sizes alone.
    """
    committed = [_look_at(path, full) for _, path in list_checkpoints(directory)]
    return committed + [_look_at(path, full) for path in sorted(directory.glob(f"{DAMAGED}*"))]


def _look_at(path: Path, full: bool) -> Found:
    try:
        manifest, problems = read_manifest(path), verify(path, full=full)
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
        size=sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
        written_at=written,
        problems=problems,
        set_aside=path.name.startswith(DAMAGED),
    )


def newest_sound(directory: Path, *, full: bool = True, clean_up: bool = False, restart: bool = False) -> Path | None:
    """Return the newest checkpoint that verifies, or None without any; damaged newer ones are named in a warning.

    Args:
        directory: ``checkpoints/`` of a run directory.
        full: compare digests, not sizes alone.
        clean_up: set damaged ones aside; only the run that holds the lock may.
        restart: return None when every one is damaged.

    Raises:
        CheckpointsDamaged: there are checkpoints, and every one is damaged.
        NewerFormat: the newest was written by a newer version.
    """
    sound: Path | None = None
    damaged: dict[Path, str] = {}
    for _, path in reversed(list_checkpoints(directory)):
        problems = verify(path, full=full)
        if not problems:
            sound = path
            break
        damaged[path] = "; ".join(problems)
        log.warning("damaged checkpoint %s: %s", path.name, damaged[path])
    if damaged and sound is None:
        # They keep their names unless asked otherwise: every launch must find them all and refuse to start over.
        if not restart:
            found = " | ".join(f"{path.name}: {problems}" for path, problems in damaged.items())
            raise CheckpointsDamaged(
                f"every checkpoint in {directory} is damaged ({found}); restore one from a backup, or start over"
            )
        log.warning("every checkpoint is damaged: they are set aside and training starts over at step 0")
    if clean_up:
        for path in damaged:
            set_aside(path)
    return sound
