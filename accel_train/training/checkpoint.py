"""Checkpoints that are complete or absent: written aside, digested, then renamed into place.

    checkpoints/.tmp-step_0001250-<nonce>/   written by all ranks, may be torn
    checkpoints/step_0001250/                after manifest, fsync and rename: complete

The manifest holds the size and SHA-256 of every file, the digest of every rank's live random
state, and its own digest. Loading trusts nothing that the manifest does not vouch for:
Accelerate swallows errors when it restores random states, so what is live afterwards is
compared with what was live when the checkpoint was written.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import re
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from safetensors import SafetensorError

from accel_train.config import CheckpointConfig, canonical_json
from accel_train.durable import fsync_directory, fsync_file, sha256_file
from accel_train.training.coordination import Coordinator
from accel_train.training.state import TrainingState

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
_STEP_DIRECTORY = re.compile(r"step_(\d+)")


class CheckpointError(RuntimeError):
    """No usable checkpoint, or one that may not be used here."""


class NewerFormat(CheckpointError):
    """A checkpoint that a newer version wrote: sound, but not for this one."""


def step_directory(step: int) -> str:
    """Name of the checkpoint of ``step``."""
    return f"step_{step:07d}"


def list_checkpoints(directory: Path) -> list[tuple[int, Path]]:
    """``(step, path)`` of every committed checkpoint, oldest first; nothing is verified."""
    if not directory.is_dir():
        return []
    found = ((_STEP_DIRECTORY.fullmatch(path.name), path) for path in directory.iterdir())
    return sorted((int(match.group(1)), path) for match, path in found if match)


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of checkpoint ``path``, its own digest verified.

    Raises:
        CheckpointError: it is missing, damaged, or of a newer format.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        stated = manifest.pop("self_sha256")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path / MANIFEST} cannot be read: {error!r}") from error
    if _digest(manifest) != stated:
        raise CheckpointError(f"{path / MANIFEST} does not match its own digest")
    if manifest["format_version"] > FORMAT_VERSION:
        raise NewerFormat(
            f"{path} has checkpoint format {manifest['format_version']}; this version reads up to "
            f"{FORMAT_VERSION}: update accel_train"
        )
    return dict(manifest)


def verify(path: Path) -> list[str]:
    """What is wrong with checkpoint ``path``, every byte read; empty when it is sound.

    Raises:
        NewerFormat: a newer version wrote it.
    """
    try:
        manifest = read_manifest(path)
    except NewerFormat:
        raise
    except CheckpointError as error:
        return [str(error)]
    problems = []
    for name, expected in manifest["files"].items():
        file = path / name
        if not file.is_file():
            problems.append(f"{name} is missing")
        elif file.stat().st_size != expected["size"]:
            problems.append(f"{name} has {file.stat().st_size} bytes instead of {expected['size']}")
        elif sha256_file(file) != expected["sha256"]:
            problems.append(f"{name} does not match its SHA-256")
    return problems


def newest_sound(directory: Path, *, set_aside: bool = False) -> Path | None:
    """The newest checkpoint that verifies; damaged newer ones are named in a warning.

    Args:
        directory: ``checkpoints/`` of a run directory.
        set_aside: rename damaged ones; only the run that holds the lock may.

    Raises:
        CheckpointError: there are checkpoints, but every one is damaged.
        NewerFormat: the newest was written by a newer version.
    """
    damaged: dict[Path, str] = {}
    for _, path in reversed(list_checkpoints(directory)):
        problems = verify(path)
        if problems:
            damaged[path] = "; ".join(problems)
            log.warning("damaged checkpoint %s: %s", path.name, damaged[path])
            continue
        # Only now: as long as none is sound, every launch must find them all and refuse to start over.
        for bad in damaged if set_aside else ():
            bad.rename(bad.with_name(f".damaged-{bad.name}-{secrets.token_hex(4)}"))
        return path
    if damaged:
        found = " | ".join(f"{path.name}: {problems}" for path, problems in damaged.items())
        raise CheckpointError(
            f"every checkpoint in {directory} is damaged ({found}); restore one from a backup, or start over with "
            "--fresh"
        )
    return None


def rng_digest(device: torch.device) -> str:
    """SHA-256 of the random states that this process draws from: Python, NumPy, torch, and its GPU's.

    Those of other visible GPUs are left out: their number may differ from launch to launch.
    """
    digest = hashlib.sha256(repr(random.getstate()).encode())
    name, keys, *rest = np.random.get_state()  # noqa: NPY002 - the global state is what is saved
    digest.update(repr((name, rest)).encode() + np.asarray(keys).tobytes())
    digest.update(torch.get_rng_state().numpy().tobytes())
    if device.type == "cuda":
        digest.update(torch.cuda.get_rng_state(device).numpy().tobytes())
    return digest.hexdigest()


def derive_rank_seed(seed: int, step: int, rank: int) -> int:
    """Seed of a rank that has no saved random state: a new rank after a change of world size."""
    digest = hashlib.sha256(f"{seed}/{step}/{rank}".encode()).digest()
    return int.from_bytes(digest[:4], "little")


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical_json(manifest).encode()).hexdigest()


class Checkpointer:
    """Saves and restores the state of one run. All methods are called on every rank.

    Args:
        directory: ``checkpoints/`` of the run directory; must be visible to all ranks.
        accelerator: holds the prepared model, optimizer and scheduler.
        coordinator: agreement between the ranks.
        config: which checkpoints are kept.
        config_hash: written into the manifest; a checkpoint of another configuration is refused.
        seed: for the random state of ranks that are new after a change of world size.
        extra_files: small files stored in every checkpoint (name to content).
    """

    def __init__(
        self,
        directory: Path,
        accelerator: Accelerator,
        coordinator: Coordinator,
        config: CheckpointConfig,
        *,
        config_hash: str = "",
        seed: int = 0,
        extra_files: Mapping[str, bytes] | None = None,
    ) -> None:
        self.directory = directory
        self._accelerator = accelerator
        self._coordinator = coordinator
        self._config = config
        self._config_hash = config_hash
        self._seed = seed
        self._extra_files = dict(extra_files or {})
        self._newest: int | None = None
        self._state: TrainingState | None = None
        accelerator.register_save_state_pre_hook(self._write_own_files)

    def save(self, state: TrainingState) -> Path:
        """Commit ``state`` and everything Accelerate holds; returns the checkpoint's path.

        A checkpoint of the same step that this launch wrote or loaded is kept, not rewritten.

        Raises:
            CheckpointError: disk full or not writable; earlier checkpoints are intact.
            LostPeer: another rank is gone; nothing was committed.
        """
        target = self.directory / step_directory(state.step)
        if self._newest == state.step:
            return target
        nonce = self._coordinator.main_phase("checkpoint directory", lambda _: secrets.token_hex(4))
        temporary = self.directory / f".tmp-{target.name}-{nonce}"
        self._write(temporary, state)
        if not self._coordinator.is_main:
            for file in temporary.glob(f"random_states_{self._coordinator.rank}.*"):
                fsync_file(file)
        rng = self._coordinator.gather("checkpoint files", rng_digest(self._accelerator.device))
        self._coordinator.main_phase("checkpoint commit", lambda _: self._commit(temporary, target, state, rng))
        self._newest = state.step
        return target

    def _write(self, temporary: Path, state: TrainingState) -> None:
        self._state = state
        try:
            self._accelerator.save_state(str(temporary), safe_serialization=True)
        except (OSError, RuntimeError, SafetensorError) as error:
            # A full disk comes as any of these. What was written would only keep it full.
            free = shutil.disk_usage(self.directory).free
            shutil.rmtree(temporary, ignore_errors=True)
            raise CheckpointError(
                f"the checkpoint of step {state.step} could not be written to {self.directory} "
                f"({free / 1e6:.0f} MB free): {error}; earlier checkpoints are intact"
            ) from error
        finally:
            self._state = None

    def load(self) -> TrainingState | None:
        """Restore the newest sound checkpoint into the prepared objects; None when there is none.

        The main process sweeps leftovers and chooses; all ranks load its choice.

        Raises:
            CheckpointError: all are damaged, or the choice may not be used here.
        """
        name = self._coordinator.main_phase("choice of the checkpoint", lambda _: self._choose())
        if name is None:
            return None
        path = self.directory / name
        manifest = read_manifest(path)
        try:
            state = TrainingState.load(path)
        except ValueError as error:
            raise CheckpointError(str(error)) from error
        self._accelerator.load_state(str(path))
        self._restore_rng(path, manifest, state)
        self._newest = state.step
        return state

    def _choose(self) -> str | None:
        self.directory.mkdir(parents=True, exist_ok=True)
        for leftover in self.directory.glob(".tmp-*"):
            shutil.rmtree(leftover)
        path = newest_sound(self.directory, set_aside=True)
        if path is None:
            return None
        theirs = read_manifest(path)["config_hash"]
        if theirs != self._config_hash:
            raise CheckpointError(
                f"{path} was written under configuration {theirs[:8]}, this is {self._config_hash[:8]}; "
                "start a new run (another --name or --output_dir) or start over with --fresh"
            )
        return path.name

    def _restore_rng(self, path: Path, manifest: Mapping[str, Any], state: TrainingState) -> None:
        rank = self._coordinator.rank
        saved = {entry["rank"]: entry["sha256"] for entry in manifest["rng"]}
        device = self._accelerator.device
        moved = state.machine.get("device_type", device.type) != device.type
        if rank not in saved or moved:
            set_seed(derive_rank_seed(self._seed, state.step, rank))
        restored = rank not in saved or moved or rng_digest(device) == saved[rank]
        failed = [r for r, ok in enumerate(self._coordinator.gather("restored random states", restored)) if not ok]
        if failed:
            raise CheckpointError(
                f"{path}: the random state of rank {failed} was not restored (its live digest differs from the "
                "manifest's): a library version may have changed; launch it as before, or start over with --fresh"
            )

    def _write_own_files(self, _models: object, _weights: object, output_dir: str) -> None:
        if self._state is None or not self._coordinator.is_main:
            return
        directory = Path(output_dir)
        self._state.save(directory)
        for name, content in self._extra_files.items():
            (directory / name).write_bytes(content)

    def _commit(self, temporary: Path, target: Path, state: TrainingState, rng: list[str]) -> None:
        files = {}
        for path in sorted(temporary.iterdir()):
            fsync_file(path)
            files[path.name] = {"size": path.stat().st_size, "sha256": sha256_file(path)}
        manifest: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "step": state.step,
            "epoch": state.epoch,
            "world_size": self._coordinator.world_size,
            "config_hash": self._config_hash,
            "files": files,
            "rng": [{"rank": rank, "sha256": digest} for rank, digest in enumerate(rng)],
        }
        manifest["self_sha256"] = _digest(manifest)
        # No newline at the end: every truncation makes it invalid JSON.
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True), encoding="utf-8")
        fsync_file(temporary / MANIFEST)
        fsync_directory(temporary)
        temporary.rename(target)
        fsync_directory(self.directory)
        self._rotate(state)

    def _rotate(self, state: TrainingState) -> None:
        checkpoints = list_checkpoints(self.directory)
        for step, path in checkpoints[: -self._config.keep_last]:
            if step != state.keep_step:
                # Renamed first: a kill in the middle of the removal leaves no torn checkpoint.
                doomed = path.with_name(f".tmp-rotated-{path.name}-{secrets.token_hex(4)}")
                path.rename(doomed)
                shutil.rmtree(doomed)
