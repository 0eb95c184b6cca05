"""The comparison of a launch with the one whose checkpoint it resumes."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from accel_train.checkpoints.manifest import require_data
from accel_train.checkpoints.state import TrainingState
from accel_train.errors import CheckpointMismatch

log = logging.getLogger(__name__)


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
        if state.arithmetic.get(name) != value:
            raise CheckpointMismatch(
                f"the checkpoint of step {state.step} was trained with {name} = {state.arithmetic.get(name)!r}, "
                f"this launch has {value!r}; launch it as before, or start over"
            )
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
