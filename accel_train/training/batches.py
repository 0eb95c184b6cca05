"""The batches of a run, from a DataLoader or, where that is as fast, straight from the dataset."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import torch
from accelerate.utils import send_to_device

from accel_train.data.loader import DatasetWithIds, build_loader
from accel_train.data.windows import copy_to_device
from accel_train.training.plan import Ids, Plan


class Batches:
    """Serves this rank's slices of the micro-steps' batches, on the device, with the ids of their samples.

    Args:
        dataset: map-style; ``__getitems__(ids)`` may return a whole batch.
        plan: cuts the dataset into steps and slices.
        device: where the batches go.
    """

    def __init__(self, dataset: Any, plan: Plan, device: torch.device) -> None:
        self._dataset, self._plan, self._device = DatasetWithIds(dataset), plan, device
        self._sampler = plan.sampler()
        self.own_positions: Ids = plan.own_positions()
        """Positions ``(local batch,)`` of this rank's slice within a micro-step's batch."""
        workers = plan.config.num_workers
        self.loader: Any = build_loader(self._dataset, self._sampler, num_workers=workers, seed=plan.seed)
        """Loads the batches of all ranks; to be replaced by what Accelerate makes of it for this one."""
        # In one process on a CPU there is nothing to copy and nothing to overlap.
        direct = dataset if device.type == "cpu" and not workers else copy_to_device(dataset, device)
        self.direct = None if direct is None else DatasetWithIds(direct)
        """Serves batches without a DataLoader; None where one is needed."""

    def of_epoch(self, epoch: int, micro_step: int) -> Generator[tuple[Ids, Any], None, None]:
        """Yield ``(ids, batch)`` of an epoch's micro-steps.

        Args:
            epoch: counted from 0.
            micro_step: the first one, counted from 0 within the epoch.
        """
        self._sampler.seek(epoch, micro_step)
        direct = self.direct
        yield from self.loader if direct is None else map(direct.__getitems__, self.loader.batch_sampler)

    def one(self, epoch: int, micro_step: int) -> Any:
        """Return this rank's slice of one micro-step's batch; the loader does not move."""
        sampler = self._plan.sampler()
        sampler.seek(epoch, micro_step)
        _, batch = self._dataset.__getitems__(next(iter(sampler))[self.own_positions])
        return send_to_device(batch, self._device)
