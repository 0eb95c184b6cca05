"""The training state: everything that must survive a kill and that Accelerate does not save.

One typed object, stored as JSON (``state.json``) and safetensors (``losses.safetensors``), never as
pickle. The rest of the run is a pure function of this object and the configuration.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

STATE_FILE = "state.json"
LOSSES_FILE = "losses.safetensors"


@dataclass
class TrainingState:
    """Where a run stands after ``step`` optimizer updates."""

    step: int = 0
    """Optimizer updates done."""
    skipped_steps: int = 0
    """Updates among them that loss scaling skipped because a gradient overflowed; the schedule did not advance."""
    epoch: int = 0
    """Index of the epoch in progress."""
    step_in_epoch: int = 0
    """Updates done in that epoch."""
    tokens_seen: int = 0
    """Tokens consumed by all ranks."""
    fingerprint: int = 0
    """Sum modulo 2**64 over every sample consumed: see :func:`accel_train.data.permutation.fingerprint_terms`."""
    train_loss: list[float] = field(default_factory=list)
    """Mean loss of every step, over all ranks and micro-steps."""
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    """Every evaluation: step, epoch, and what the evaluator returned."""
    evaluation_due: bool = False
    """The evaluation that belongs to this step has not been done."""
    keep_step: int | None = None
    """Step of the checkpoint that rotation must keep: the first that passed the gate."""
    best_step: int | None = None
    """Step of the checkpoint with the lowest validation loss so far, which rotation keeps as well."""
    best_loss: float | None = None
    """That loss, in nats per token."""
    stopped: bool = False
    """The evaluator ended training before the budget was used."""
    world_sizes: list[int] = field(default_factory=list)
    """Number of processes of every launch so far."""
    resumes: list[dict[str, Any]] = field(default_factory=list)
    """Every resume: step, number of processes, and what differed."""
    data: dict[str, str] = field(default_factory=dict)
    """SHA-256 (hex) of everything that the data is made of, by name, as the task gives it."""
    arithmetic: dict[str, str] = field(default_factory=dict)
    """Precision, compilation and sharding in force: see :func:`accel_train.ranks.accelerator.arithmetic`."""
    machine: dict[str, Any] = field(default_factory=dict)
    """Device, threads and versions in force: see :func:`accel_train.ranks.accelerator.machine`."""

    def save(self, directory: Path) -> None:
        """Write ``state.json`` and ``losses.safetensors`` into ``directory``."""
        values = {k: v for k, v in asdict(self).items() if k != "train_loss"}
        values["fingerprint"] = self.fingerprint_hex
        (directory / STATE_FILE).write_text(json.dumps(values, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        save_file({"train_loss": torch.tensor(self.train_loss, dtype=torch.float64)}, directory / LOSSES_FILE)

    @classmethod
    def load(cls, directory: Path) -> TrainingState:
        """Return the state that :meth:`save` wrote into ``directory``.

        Raises:
            ValueError: the files do not fit each other or this version.
        """
        path, losses_path = directory / STATE_FILE, directory / LOSSES_FILE
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict) or "step" not in values or not isinstance(values.get("fingerprint"), str):
            raise ValueError(f"{path} is not a training state")
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(f"{path}: unknown fields {unknown}: written by a newer version?")
        values["fingerprint"] = int(values["fingerprint"], 16)
        tensors = load_file(losses_path)
        if "train_loss" not in tensors:
            raise ValueError(f"{losses_path} has no tensor 'train_loss'")
        state = cls(**values | {"train_loss": tensors["train_loss"].tolist()})
        if len(state.train_loss) != state.step:
            raise ValueError(f"{losses_path}: {len(state.train_loss)} losses for {state.step} steps")
        return state

    @property
    def fingerprint_hex(self) -> str:
        """The fingerprint as 16 hexadecimal digits."""
        return f"{self.fingerprint:016x}"
