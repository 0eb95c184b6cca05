"""How a run is cut into epochs, steps, micro-steps and slices of ranks, and its learning rate: pure functions."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from accel_train.config.sections import TrainingConfig
from accel_train.data.permutation import GlobalBatchSampler
from accel_train.errors import ConfigError

Ids = npt.NDArray[np.int64]


def cosine_with_warmup(step: int, warmup_steps: int, total_steps: int, min_lr_ratio: float = 0.1) -> float:
    """Return the factor on the peak learning rate for step ``step`` (counted from 0).

    Linear warm-up ``(step + 1) / warmup_steps``, so that the first step already learns; half a
    cosine (Loshchilov and Hutter 2017) from the peak at ``warmup_steps`` down to ``min_lr_ratio``
    in the last step, ``total_steps - 1``, where it stays.

    Args:
        step: number of steps done.
        warmup_steps: steps of the warm-up; 0 starts at the peak.
        total_steps: steps of the whole run.
        min_lr_ratio: final factor.

    Returns:
        A factor in ``(0, 1]``, or ``min_lr_ratio`` where that is 0.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min((step - warmup_steps) / max(total_steps - 1 - warmup_steps, 1), 1.0)
    return min_lr_ratio + (1.0 - min_lr_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress))


def warmup_steps(config: TrainingConfig, total_steps: int) -> int:
    """Return the warm-up's steps: ``config.warmup_steps`` if set, else ``config.warmup_ratio`` of the run, rounded."""
    return round(config.warmup_ratio * total_steps) if config.warmup_steps is None else config.warmup_steps


@dataclass(frozen=True)
class Plan:
    """How a dataset of ``samples`` is cut into epochs, steps, micro-steps and slices of ranks.

    Raises:
        ConfigError: the dataset is smaller than a batch, or the batch cannot be split.
    """

    config: TrainingConfig
    samples: int
    world_size: int
    rank: int
    seed: int

    def __post_init__(self) -> None:
        self.config.check_world_size(self.world_size)
        if self.steps_per_epoch == 0:
            rule = f"is larger than the dataset of {self.samples} samples; use a smaller batch or more data"
            raise ConfigError("training.batch_size", self.config.batch_size, rule)

    @property
    def accumulation(self) -> int:
        """Number of micro-steps per step."""
        return self.config.gradient_accumulation_steps

    @property
    def micro_batch(self) -> int:
        """Number of samples per micro-step over all ranks."""
        return self.config.batch_size // self.accumulation

    @property
    def steps_per_epoch(self) -> int:
        """Number of whole batches in the dataset."""
        return self.samples // self.config.batch_size

    @property
    def total_steps(self) -> int:
        """Number of steps of the run: the smaller of max_epochs and max_steps."""
        budget = self.config.max_epochs * self.steps_per_epoch
        return budget if self.config.max_steps == -1 else min(budget, self.config.max_steps)

    def own_positions(self) -> Ids:
        """Return the positions ``(local batch,)`` of this rank's slice within a micro-step's batch."""
        local = self.micro_batch // self.world_size
        return self.rank * local + np.arange(local, dtype=np.int64)

    def first_position(self, epoch: int, step_in_epoch: int) -> int:
        """Return the position of a step's first sample, counted over the whole run."""
        return (epoch * self.steps_per_epoch + step_in_epoch) * self.config.batch_size

    def epoch_of(self, step: int) -> int:
        """Return the epoch, counted from 1, of step ``step``, counted from 1."""
        return -(-step // self.steps_per_epoch)

    def sampler(self) -> GlobalBatchSampler:
        """Return a sampler of the micro-steps' batches, in the run's order."""
        return GlobalBatchSampler(self.samples, self.micro_batch, self.seed, self.steps_per_epoch * self.accumulation)

    def lr_factor(self, step: int) -> float:
        """Return the learning rate of update ``step`` (from 0) as a fraction of the peak."""
        warm_up = warmup_steps(self.config, self.total_steps)
        return cosine_with_warmup(step, warm_up, self.total_steps, self.config.min_lr_ratio)

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of update ``step`` (from 0)."""
        return self.config.learning_rate * self.lr_factor(step)
