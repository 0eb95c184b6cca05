"""Saving and loading of checkpoints, each a sealed directory (see :mod:`accel_train.files.sealed`).

    checkpoints/.tmp-step_0001250-<nonce>/   being written by all ranks
    checkpoints/step_0001250/                after manifest, fsync and rename: complete

All ranks train on as soon as each has written its files; digests, fsync, rename and rotation follow in
a thread of the main process, which uses no collective. At most one save is in flight: the next save,
the end of training and every exit wait for it.

Accelerate swallows errors when it restores random states, so after loading the live random states are
compared with the digests in the manifest. Accelerate unpickles its own files with ``weights_only=True``,
so a file from a stranger cannot run code; ours are JSON and safetensors.
"""

from __future__ import annotations

import logging
import pickle
import shutil
import sys
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from safetensors import SafetensorError

from accel_train.checkpoints import manifest, random_states
from accel_train.checkpoints.state import TrainingState
from accel_train.config.sections import CheckpointConfig
from accel_train.errors import CheckpointError, CheckpointMismatch
from accel_train.files import sealed
from accel_train.files.atomic import fsync_file
from accel_train.process import fault_points, work
from accel_train.ranks.coordinator import Coordinator
from accel_train.ranks.store import is_lost_peer

log = logging.getLogger(__name__)


@contextmanager
def _no_crc32() -> Iterator[None]:
    """Turn off torch's CRC32 of every tensor, for which training would have to wait: the manifest has a SHA-256."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


@dataclass(eq=False)
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
        reached: called with every fault point (see :mod:`accel_train.process.fault_points`).
    """

    directory: Path
    accelerator: Accelerator
    coordinator: Coordinator
    config: CheckpointConfig
    _: KW_ONLY
    config_hash: str = ""
    seed: int = 0
    extra_files: Mapping[str, bytes] = field(default_factory=dict)
    logs: Sequence[Path] = ()
    restart: bool = False
    reached: Callable[[str], None] = work.pass_by

    def __post_init__(self) -> None:
        self._newest: int | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-commit")
        self._commit: Future[None] | None = None

    # -- saving ----------------------------------------------------------------------------

    def save(self, state: TrainingState) -> Path:
        """Write ``state`` and everything that Accelerate holds, and commit it in the background.

        Waits for the save before. A checkpoint of the same step that this launch wrote or loaded is
        kept, not rewritten.

        Returns:
            The checkpoint's path, which exists after :meth:`wait`.

        Raises:
            CheckpointError: this save could not be written, or the one before could not be committed
                (disk full, not writable); earlier checkpoints are intact.
            LostPeer: another rank is gone; nothing was committed.
        """
        target = self.directory / manifest.step_directory(state.step)
        if self._newest == state.step:
            return target
        phase = "commit of the checkpoint before"
        temporary = self.directory / self.coordinator.main_phase(phase, lambda _: self._make_way(target))
        self.reached(fault_points.SAVE_BEGUN)
        self._write(temporary, state)
        if not self.coordinator.is_main:
            for file in temporary.glob(f"random_states_{self.coordinator.rank}.*"):
                fsync_file(file)
        self.reached(fault_points.SAVE_WRITTEN)
        rng = self.coordinator.gather("checkpoint files", random_states.rng_digest(self.accelerator.device))
        if self.coordinator.is_main:
            header = {
                "step": state.step,
                "epoch": state.epoch,
                "world_size": self.coordinator.world_size,
                "config_hash": self.config_hash,
                "rng": [{"rank": rank, "sha256": digest} for rank, digest in enumerate(rng)],
            }
            kept = {state.keep_step, state.best_step}
            self._commit = self._thread.submit(self._finish, temporary, target, header, kept)
        self._newest = state.step
        return target

    def wait(self) -> None:
        """Return when the save in flight, if any, is committed and rotation is done.

        Raises:
            CheckpointError: it could not be committed; earlier checkpoints are intact.
        """
        self.coordinator.main_phase("commit of the checkpoint", lambda _: self._join())

    @property
    def failure(self) -> BaseException | None:
        """The error of the save in flight, as soon as it is known; never waits."""
        return self._commit.exception() if self._commit is not None and self._commit.done() else None

    def close(self) -> None:
        """Wait for the save in flight, on this rank alone; its failure is only logged."""
        leaving_with = sys.exception()
        try:
            self._join()
        except Exception as error:
            # Whoever catches the error that ends the run reports it.
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

    def _make_way(self, target: Path) -> str:
        self._join()
        return sealed.temporary_path(target).name

    def _write(self, temporary: Path, state: TrainingState) -> None:
        try:
            if self.coordinator.is_main:
                temporary.mkdir(parents=True, exist_ok=True)
                state.save(temporary)
                for name, content in self.extra_files.items():
                    (temporary / name).write_bytes(content)
                self.reached(fault_points.SAVE_HALF_WRITTEN)
            with _no_crc32():
                self.accelerator.save_state(str(temporary), safe_serialization=True)
            random_states.save_device_state(temporary, self.coordinator.rank, self.accelerator.device)
        except (OSError, RuntimeError, SafetensorError) as error:
            if is_lost_peer(error):
                raise
            # A full disk raises any of these. What was written would only keep it full.
            raise self._given_up(temporary, state.step, error) from error

    def _finish(self, temporary: Path, target: Path, header: Mapping[str, Any], kept: Container[int | None]) -> None:
        """Digest, seal, rename and rotate; in the background, on the main process."""
        try:
            self.reached(fault_points.COMMIT_BEGUN)
            for file in self.logs:
                if file.exists():
                    fsync_file(file)
            manifest.write_manifest(temporary, header)
            self.reached(fault_points.COMMIT_SEALED)
            sealed.commit(temporary, target)
        except OSError as error:
            raise self._given_up(temporary, header["step"], error) from error
        self.reached(fault_points.COMMIT_RENAMED)
        self._rotate(kept)

    def _given_up(self, temporary: Path, step: int, error: Exception) -> CheckpointError:
        free = shutil.disk_usage(self.directory).free
        shutil.rmtree(temporary, ignore_errors=True)
        return CheckpointError(
            f"the checkpoint of step {step} could not be written to {self.directory} "
            f"({free / 1e6:.0f} MB free): {error}; earlier checkpoints are intact"
        )

    def _rotate(self, kept: Container[int | None]) -> None:
        for step, path in manifest.list_checkpoints(self.directory)[: -self.config.keep_last]:
            if step not in kept:
                try:
                    doomed = sealed.retire(path)
                    self.reached(fault_points.ROTATION_RENAMED)
                    shutil.rmtree(doomed)
                except OSError as error:
                    # The new checkpoint counts already; the next launch sweeps what is left.
                    log.warning("the old checkpoint %s could not be removed: %s", path.name, error)

    # -- loading ---------------------------------------------------------------------------

    def load(self) -> TrainingState | None:
        """Restore the newest sound checkpoint into the prepared objects and return its state; None without any.

        The main process sweeps leftovers and chooses; all ranks load its choice.

        Raises:
            CheckpointsDamaged: there are checkpoints, and every one is damaged.
            CheckpointMismatch: the newest belongs to another configuration, or its random states cannot be restored.
            CheckpointError: it cannot be loaded.
        """
        name = self.coordinator.main_phase("choice of the checkpoint", lambda _: self._choose())
        if name is None:
            return None
        path = self.directory / name
        saved_by_rank = {entry["rank"]: entry["sha256"] for entry in manifest.read_manifest(path)["rng"]}
        try:
            state = TrainingState.load(path)
            self.accelerator.load_state(str(path))
            random_states.load_device_state(path, self.coordinator.rank, self.accelerator.device)
        except pickle.UnpicklingError as error:
            raise CheckpointError(f"{path} holds a pickle with more than plain values: not loaded, not run") from error
        except (ValueError, RuntimeError, SafetensorError) as error:
            if is_lost_peer(error):
                raise
            raise CheckpointError(f"{path} cannot be loaded: {error}") from error
        self._restore_rng(path, saved_by_rank, state)
        self._newest = state.step
        return state

    def _choose(self) -> str | None:
        self.directory.mkdir(parents=True, exist_ok=True)
        for _, leftover in sealed.leftovers(self.directory):
            shutil.rmtree(leftover)
        full = self.config.verify == "full"
        path = manifest.newest_sound(self.directory, full=full, clean_up=True, restart=self.restart)
        if path is None:
            return None
        manifest.require_configuration(path, self.config_hash, "start a new run, or start over")
        return path.name

    def _restore_rng(self, path: Path, saved: Mapping[int, str], state: TrainingState) -> None:
        rank, device = self.coordinator.rank, self.accelerator.device
        is_new = rank not in saved or state.machine.get("device_type", device.type) != device.type
        if is_new:
            set_seed(random_states.derive_rank_seed(self.seed, state.step, rank))
        restored = is_new or random_states.rng_digest(device) == saved[rank]
        failed = [r for r, ok in enumerate(self.coordinator.gather("restored random states", restored)) if not ok]
        if failed:
            raise CheckpointMismatch(
                f"{path}: the random state of rank {failed} was not restored (its live digest differs from the "
                "manifest's): a library version may have changed; launch it as before, or start over"
            )
