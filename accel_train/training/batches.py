"""The batches of a run, from a DataLoader or, where that is as fast, straight from the dataset."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from accelerate.utils import send_to_device

from accel_train.data.loader import DatasetWithIds
from accel_train.data.permutation import GlobalBatchSampler
from accel_train.data.windows import copy_to_device
from accel_train.training.plan import Plan

Ids = npt.NDArray[np.int64]


class Batches:
    """Serves this rank's slices of the micro-steps' batches, on the device, with the ids of their samples.

    Args:
        dataset: map-style; ``__getitems__(ids)`` may return a whole batch.
        plan: cuts the dataset into steps and slices.
        device: where the batches go.
        num_workers: processes that load data.
    """

    def __init__(self, dataset: Any, plan: Plan, device: torch.device, num_workers: int) -> None:
        self.dataset = DatasetWithIds(dataset)
        self.sampler: GlobalBatchSampler = plan.sampler()
        self.own_positions: Ids = plan.own_positions()
        """Positions ``(local batch,)`` of this rank's slice within a micro-step's batch."""
        self.direct = self._without_loader(dataset, device, num_workers)
        """Serves batches without a DataLoader; None where one is needed."""
        self._plan, self._device = plan, device

    def _without_loader(self, dataset: Any, device: torch.device, num_workers: int) -> DatasetWithIds | None:
        if device.type == "cpu":
            # In one process on a CPU there is nothing to copy and nothing to overlap.
            return None if num_workers else self.dataset
        on_device = copy_to_device(dataset, device)
        return None if on_device is None else DatasetWithIds(on_device)

    def of_epoch(self, loader: Any, epoch: int, micro_step: int) -> Generator[tuple[Ids, Any], None, None]:
        """Yield ``(ids, batch)`` of an epoch's micro-steps.

        Args:
            loader: the prepared DataLoader over :attr:`sampler`.
            epoch: counted from 0.
            micro_step: the first one, counted from 0 within the epoch.
        """
        self.sampler.seek(epoch, micro_step)
        if self.direct is None:
            yield from loader
            return
        for ids in loader.batch_sampler:
            yield self.direct.__getitems__(ids)

    def one(self, epoch: int, micro_step: int) -> Any:
        """Return this rank's slice of one micro-step's batch; the loader does not move."""
        sampler = self._plan.sampler()
        sampler.seek(epoch, micro_step)
        _, batch = self.dataset.__getitems__(next(iter(sampler))[self.own_positions])
        return send_to_device(batch, self._device)
