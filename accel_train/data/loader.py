"""A DataLoader that Accelerate can split, whose batches carry the ids of their samples.

The ids are a NumPy array beside the tensors, so they stay on the host: the fingerprint of the
consumed samples costs neither a transfer nor a kernel launch.
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
from accel_train.process.signals import STOP_SIGNALS


class DatasetWithIds(Dataset[Any]):
    """A dataset whose batches are ``(ids, batch)``.

    The ``__getitems__`` of ``dataset`` may return a collated batch (one vectorised gather) or a list
    of samples, which is collated here; without that method samples are fetched one by one.

    Args:
        dataset: anything with ``__len__``, and ``__getitem__`` or ``__getitems__``.
    """

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset
        self._gather = getattr(dataset, "__getitems__", None)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitems__(self, ids: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], Any]:
        """Return ``ids``, int64 ``(batch,)``, and the batch of these samples."""
        batch = [self._dataset[int(i)] for i in ids] if self._gather is None else self._gather(ids)
        return ids, default_collate([_as_tensors(item) for item in batch]) if isinstance(batch, list) else batch


def _as_tensors(item: Any) -> Any:
    """Turn lists of numbers in a dictionary, as Hugging Face datasets return them, into tensors."""
    if not isinstance(item, dict):
        return item
    return {name: torch.tensor(value) if isinstance(value, list) else value for name, value in item.items()}


def seed_worker(_worker_id: int) -> None:
    """Seed Python and NumPy in a DataLoader worker from torch's seed of that worker, and ignore signals to stop.

    A scheduler signals the whole process group. If a worker died of the signal, the training process would fail
    in the middle of a step, instead of saving its state and leaving.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    seed = torch.initial_seed() % 2**32
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - a dataset's own code may draw from it


def build_loader(
    dataset: DatasetWithIds, sampler: GlobalBatchSampler, *, num_workers: int, seed: int
) -> DataLoader[Any]:
    """Return a DataLoader of ``sampler``'s batches; its own generator leaves the global random state as it is."""
    return DataLoader(
        dataset,
        batch_sampler=sampler,  # type: ignore[arg-type] # arrays of ids instead of lists
        num_workers=num_workers,
        collate_fn=_identity,
        worker_init_fn=seed_worker,
        generator=torch.Generator().manual_seed(seed),
        pin_memory=torch.cuda.is_available(),
    )


def _identity(batch: Any) -> Any:
    return batch


def count_tokens(batch: Any) -> int:
    """Return the number of tokens in a batch: the elements of its first tensor; without access to the device."""
    if isinstance(batch, torch.Tensor):
        return batch.numel()
    values = batch.values() if isinstance(batch, dict) else batch
    return next((value.numel() for value in values if isinstance(value, torch.Tensor)), 0)
