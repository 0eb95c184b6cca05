"""Checkpoints that are complete or absent: written aside, digested, then renamed into place.

    checkpoints/.tmp-step_0001250-<nonce>/   written by all ranks, may be torn
    checkpoints/step_0001250/                after manifest, fsync and rename: complete

The ranks train on as soon as all of them have written their files; digests, fsync, rename and
rotation follow in a thread of the main process, in which there is no collective. One save at most is
in flight: the next one, the end of training and every exit wait for it.

Loading trusts nothing that the manifest does not vouch for: Accelerate swallows errors when it
restores random states, so what is live afterwards is compared with what was live when the
checkpoint was written. Accelerate's own files are unpickled with ``weights_only=True``, so one
from a stranger cannot run code; ours are JSON and safetensors.
"""

from __future__ import annotations

import hashlib
import logging
import pickle
import random
import secrets
import shutil
import sys
from collections.abc import Container, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from safetensors import SafetensorError

from accel_train.checkpoints.manifest import (
    TEMPORARY,
    list_checkpoints,
    newest_sound,
    read_manifest,
    require_configuration,
    step_directory,
    write_manifest,
)
from accel_train.checkpoints.state import TrainingState
from accel_train.config.sections import CheckpointConfig
from accel_train.errors import CheckpointError
from accel_train.files.atomic import fsync_directory, fsync_file
from accel_train.process.fault_points import (
    COMMIT_BEGUN,
    COMMIT_RENAMED,
    COMMIT_SEALED,
    ROTATION_RENAMED,
    SAVE_BEGUN,
    SAVE_HALF_WRITTEN,
    SAVE_WRITTEN,
    SILENT,
    Observer,
)
from accel_train.ranks.coordinator import Coordinator
from accel_train.ranks.store import is_lost_peer

log = logging.getLogger(__name__)


@contextmanager
def _no_crc32() -> Iterator[None]:
    """Without torch's CRC32 of every tensor, for which training would have to wait: the manifest has a SHA-256."""
    if not hasattr(torch.serialization, "set_crc32_options"):
        yield
        return
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


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


class Checkpointer:
    """Saves and restores the state of one run. All methods are called on every rank.

    Args:
        directory: ``checkpoints/`` of the run directory; must be visible to all ranks.
        accelerator: holds the prepared model, optimizer and scheduler.
        coordinator: agreement between the ranks.
        config: which checkpoints are kept, and how they are verified.
        config_hash: written into the manifest; a checkpoint of another configuration is refused.
        seed: for the random state of ranks that are new after a change of world size.
        extra_files: small files stored in every checkpoint (name to content).
        logs: files beside the checkpoints that must be on disk before a checkpoint counts; they may be missing.
        restart: start over when every checkpoint is damaged, instead of refusing.
        observer: hears of every point at which a fault may fall.
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
        logs: Sequence[Path] = (),
        restart: bool = False,
        observer: Observer = SILENT,
    ) -> None:
        self.directory = directory
        self._accelerator = accelerator
        self._coordinator = coordinator
        self._config = config
        self._config_hash = config_hash
        self._seed = seed
        self._extra_files = dict(extra_files or {})
        self._logs = tuple(logs)
        self._restart = restart
        self._observer = observer
        self._newest: int | None = None
        self._state: TrainingState | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-commit")
        self._commit: Future[None] | None = None
        accelerator.register_save_state_pre_hook(self._write_own_files)

    # -- saving ----------------------------------------------------------------------------

    def save(self, state: TrainingState) -> Path:
        """Write ``state`` and everything Accelerate holds, and have it committed in the background.

        Returns the path under which the checkpoint will stand; :meth:`wait` makes sure that it does.
        Waits for the save before. A checkpoint of the same step that this launch wrote or loaded is
        kept, not rewritten.

        Raises:
            CheckpointError: this save could not be written, or the one before could not be committed
                (disk full, not writable); earlier checkpoints are intact.
            LostPeer: another rank is gone; nothing was committed.
        """
        target = self.directory / step_directory(state.step)
        if self._newest == state.step:
            return target
        nonce = self._coordinator.main_phase("commit of the checkpoint before", lambda _: self._make_way())
        temporary = self.directory / f"{TEMPORARY}{target.name}-{nonce}"
        self._observer.reached(SAVE_BEGUN)
        self._write(temporary, state)
        if not self._coordinator.is_main:
            for file in temporary.glob(f"random_states_{self._coordinator.rank}.*"):
                fsync_file(file)
        self._observer.reached(SAVE_WRITTEN)
        rng = self._coordinator.gather("checkpoint files", rng_digest(self._accelerator.device))
        if self._coordinator.is_main:
            header = {
                "step": state.step,
                "epoch": state.epoch,
                "world_size": self._coordinator.world_size,
                "config_hash": self._config_hash,
                "rng": [{"rank": rank, "sha256": digest} for rank, digest in enumerate(rng)],
            }
            self._commit = self._thread.submit(
                self._finish, temporary, target, header, {state.keep_step, state.best_step}
            )
        self._newest = state.step
        return target

    def wait(self) -> None:
        """Return when the save in flight, if any, is committed and rotation is done.

        Raises:
            CheckpointError: it could not be committed; earlier checkpoints are intact.
        """
        self._coordinator.main_phase("commit of the checkpoint", lambda _: self._join())

    @property
    def idle(self) -> bool:
        """Whether no commit is going on in the background of this rank."""
        return self._commit is None or self._commit.done()

    @property
    def failure(self) -> BaseException | None:
        """Why the save in flight could not be committed, as soon as that is known; never waits."""
        return self._commit.exception() if self._commit is not None and self._commit.done() else None

    def close(self) -> None:
        """Wait for the save in flight on the way out, on this rank alone; its failure is only logged."""
        leaving_with = sys.exception()
        try:
            self._join()
        except Exception as error:
            # What ends the run is told by whoever catches it.
            if error is not leaving_with:
                log.error("%s", error)

    def _join(self) -> None:
        if self._commit is None:
            return
        try:
            self._commit.result()
        finally:
            # An interrupted wait must be repeated: the run directory is this process's until the commit is over.
            if self._commit.done():
                self._commit = None

    def _make_way(self) -> str:
        self._join()
        return secrets.token_hex(4)

    def _write(self, temporary: Path, state: TrainingState) -> None:
        self._state = state
        try:
            with _no_crc32():
                self._accelerator.save_state(str(temporary), safe_serialization=True)
        except (OSError, RuntimeError, SafetensorError) as error:
            if is_lost_peer(error):
                raise
            # A full disk comes as any of these. What was written would only keep it full.
            raise self._given_up(temporary, state.step, error) from error
        finally:
            self._state = None

    def _write_own_files(self, _models: object, _weights: object, output_dir: str) -> None:
        if self._state is None or not self._coordinator.is_main:
            return
        directory = Path(output_dir)
        self._state.save(directory)
        for name, content in self._extra_files.items():
            (directory / name).write_bytes(content)
        self._observer.reached(SAVE_HALF_WRITTEN)

    def _finish(self, temporary: Path, target: Path, header: Mapping[str, Any], kept: Container[int | None]) -> None:
        """Digest, seal, rename, rotate; in the background, on the main process."""
        try:
            self._observer.reached(COMMIT_BEGUN)
            for file in self._logs:
                if file.exists():
                    fsync_file(file)
            write_manifest(temporary, header)
            self._observer.reached(COMMIT_SEALED)
            temporary.rename(target)
            fsync_directory(self.directory)
        except OSError as error:
            raise self._given_up(temporary, header["step"], error) from error
        self._observer.reached(COMMIT_RENAMED)
        self._rotate(kept)

    def _given_up(self, temporary: Path, step: int, error: Exception) -> CheckpointError:
        free = shutil.disk_usage(self.directory).free
        shutil.rmtree(temporary, ignore_errors=True)
        return CheckpointError(
            f"the checkpoint of step {step} could not be written to {self.directory} "
            f"({free / 1e6:.0f} MB free): {error}; earlier checkpoints are intact"
        )

    def _rotate(self, kept: Container[int | None]) -> None:
        for step, path in list_checkpoints(self.directory)[: -self._config.keep_last]:
            if step not in kept:
                # Renamed first: a kill in the middle of the removal leaves no torn checkpoint.
                doomed = path.with_name(f"{TEMPORARY}rotated-{path.name}-{secrets.token_hex(4)}")
                try:
                    path.rename(doomed)
                    self._observer.reached(ROTATION_RENAMED)
                    shutil.rmtree(doomed)
                except OSError as error:
                    # The new checkpoint counts already; the next launch sweeps what is left.
                    log.warning("the old checkpoint %s could not be removed: %s", path.name, error)

    # -- loading ---------------------------------------------------------------------------

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
            self._accelerator.load_state(str(path))
        except pickle.UnpicklingError as error:
            raise CheckpointError(f"{path} holds a pickle with more than plain values: not loaded, not run") from error
        except (ValueError, RuntimeError, SafetensorError) as error:
            if is_lost_peer(error):
                raise
            raise CheckpointError(f"{path} cannot be loaded: {error}") from error
        self._restore_rng(path, manifest, state)
        self._newest = state.step
        return state

    def _choose(self) -> str | None:
        self.directory.mkdir(parents=True, exist_ok=True)
        for leftover in self.directory.glob(f"{TEMPORARY}*"):
            shutil.rmtree(leftover)
        path = newest_sound(self.directory, full=self._config.verify == "full", set_aside=True, restart=self._restart)
        if path is None:
            return None
        cure = "start a new run (another --name or --output_dir) or start over with --fresh"
        require_configuration(path, self._config_hash, cure)
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
