"""The checkpoints of a trainer: timed, saved, committed in the background, then reported to the callbacks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from accel_train.checkpoints.checkpointer import Checkpointer
from accel_train.checkpoints.state import TrainingState
from accel_train.process.stopwatch import Stopwatch
from accel_train.training.callbacks import Callback, LoopState


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
        if path is None:
            return
        for callback in self._callbacks:
            callback.on_checkpoint(self._loop_state, path)
