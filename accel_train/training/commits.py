"""The checkpoints of a trainer: saved, committed in the background, reported to the callbacks, and gone on from."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accel_train.checkpoints.checkpointer import Checkpointer
from accel_train.checkpoints.manifest import require_data
from accel_train.checkpoints.state import TrainingState
from accel_train.errors import CheckpointMismatch
from accel_train.process.stopwatch import Stopwatch
from accel_train.training.callbacks import Callback, LoopState

log = logging.getLogger(__name__)


class Commits:
    """Saves and restores; does nothing without a checkpointer.

    Args:
        checkpointer: None for a trainer without a run directory.
        callbacks: hear of every committed checkpoint.
        loop_state: what they see.
        clock: of the trainer.
    """

    def __init__(
        self, checkpointer: Checkpointer | None, callbacks: Sequence[Callback], loop_state: LoopState, clock: Stopwatch
    ) -> None:
        self._checkpointer, self._callbacks = checkpointer, callbacks
        self._loop_state, self._clock = loop_state, clock
        self._unreported: Path | None = None

    def load(self) -> TrainingState | None:
        """Restore the newest sound checkpoint; None when there is none. See :meth:`Checkpointer.load`."""
        return None if self._checkpointer is None else self._checkpointer.load()

    @property
    def failure(self) -> BaseException | None:
        """Why the save in flight could not be committed, as soon as that is known."""
        return None if self._checkpointer is None else self._checkpointer.failure

    def save(self, state: TrainingState) -> None:
        """Write a checkpoint, and have it committed in the background; see :meth:`Checkpointer.save`."""
        if self._checkpointer is None:
            return
        with self._clock.timed("checkpoint"):
            path = self._checkpointer.save(state)
        if path != self._unreported:
            # To save, the checkpointer waited for the one before.
            self._report()
            self._unreported = path

    def settle(self) -> None:
        """Wait for the save in flight; on every rank."""
        if self._checkpointer is not None:
            with self._clock.timed("checkpoint"):
                self._checkpointer.wait()
            self._report()

    def close(self) -> None:
        """Wait for the save in flight on the way out, on this rank alone."""
        if self._checkpointer is not None:
            self._checkpointer.close()

    def _report(self) -> None:
        path, self._unreported = self._unreported, None
        if path is not None:
            for callback in self._callbacks:
                callback.on_checkpoint(self._loop_state, path)


def note_resume(
    state: TrainingState, arithmetic: Mapping[str, str], machine: dict[str, Any], data: Mapping[str, str]
) -> None:
    """Refuse a checkpoint of other arithmetic or data than this launch's; record and log what else differs.

    Args:
        state: the checkpoint's state; its ``resumes`` and ``machine`` are updated.
        arithmetic: of this launch, see :func:`accel_train.ranks.accelerator.arithmetic`.
        machine: of this launch, see :func:`accel_train.ranks.accelerator.machine`.
        data: digests of this launch's data, by name.

    Raises:
        CheckpointMismatch: names what differs and both values.
    """
    for name, value in arithmetic.items():
        if (then := state.arithmetic.get(name)) != value:
            trained = f"the checkpoint of step {state.step} was trained with {name} = {then!r}"
            raise CheckpointMismatch(f"{trained}, this launch has {value!r}; launch it as before, or start over")
    require_data(state.data, data, state.step, "start over")
    changes = {k: [state.machine.get(k), v] for k, v in machine.items() if state.machine.get(k) != v}
    for name, (before, now) in changes.items():
        log.warning("resuming with %s = %r instead of %r: the bits may differ", name, now, before)
    world = machine["num_processes"]
    state.resumes.append({"step": state.step, "world_size": world, "changes": changes})
    if world > state.machine.get("num_processes", world):
        log.warning("ranks that are new start with random states derived from seed, step and rank")
    state.machine = machine
    log.info("resumed at step %d", state.step)
