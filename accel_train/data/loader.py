"""Batches with the ids of their samples, through a DataLoader that Accelerate can split.

The ids travel beside the tensors as a NumPy array, so they stay on the host: the fingerprint
of what was consumed costs neither a transfer nor a kernel launch.
"""

from __future__ import annotations

import random
import signal
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from accel_train.data.permutation import GlobalBatchSampler


class DatasetWithIds(Dataset[Any]):
    """Serves ``(ids, batch)`` for a whole array of ids at once.

    A dataset's ``__getitems__`` may return a ready batch (one vectorised gather) or a list of
    samples, which is collated; without it samples are fetched one by one.
    """

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset
        self._gather = getattr(dataset, "__getitems__", None)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitems__(self, ids: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], Any]:
        """``ids`` (batch,) int64 and the batch of those samples."""
        batch = [self._dataset[int(i)] for i in ids] if self._gather is None else self._gather(ids)
        return ids, default_collate([_as_tensors(item) for item in batch]) if isinstance(batch, list) else batch


def _as_tensors(item: Any) -> Any:
    """Lists of numbers in a dictionary, as Hugging Face datasets return them, become tensors."""
    if not isinstance(item, dict):
        return item
    return {name: torch.tensor(value) if isinstance(value, list) else value for name, value in item.items()}


def seed_worker(_worker_id: int) -> None:
    """Seed Python and NumPy in a DataLoader worker from torch's seed of that worker; leave signals to its parent.

    A scheduler signals the whole process group. A worker that died of it would fail the training
    process in the middle of a step, instead of letting it save and leave.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    seed = torch.initial_seed() % 2**32
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - what a dataset's own code would draw from


def build_loader(
    dataset: DatasetWithIds, sampler: GlobalBatchSampler, *, num_workers: int, seed: int
) -> DataLoader[Any]:
    """A DataLoader over ``sampler``'s batches; its generator keeps the global random state untouched."""
    return DataLoader(
        dataset,
        batch_sampler=sampler,  # type: ignore[arg-type] # arrays of ids instead of lists
        num_workers=num_workers,
        collate_fn=_as_is,
        worker_init_fn=seed_worker,
        generator=torch.Generator().manual_seed(seed),
        persistent_workers=False,
        pin_memory=torch.cuda.is_available(),
    )


def _as_is(batch: Any) -> Any:
    return batch


def count_tokens(batch: Any) -> int:
    """Tokens in a batch: the elements of its first tensor; no device access."""
    if isinstance(batch, torch.Tensor):
        return batch.numel()
    values = batch.values() if isinstance(batch, dict) else batch
    return next((value.numel() for value in values if isinstance(value, torch.Tensor)), 0)
