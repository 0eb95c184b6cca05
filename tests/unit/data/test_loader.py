"""Batches with ids."""

from __future__ import annotations

import random

import numpy as np
import torch

from accel_train.data.loader import DatasetWithIds, build_loader
from accel_train.data.permutation import GlobalBatchSampler


class Drawing:
    """A dataset that draws from every global generator."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> torch.Tensor:
        return torch.tensor([random.random(), np.random.rand(), float(torch.rand(1))], dtype=torch.float64)


def drawn(seed: int) -> list[list[float]]:
    loader = build_loader(DatasetWithIds(Drawing()), GlobalBatchSampler(8, 4, 0), num_workers=2, seed=seed)
    return [row.tolist() for _, batch in loader for row in batch]


def test_workers_are_seeded_by_the_run_and_differ() -> None:
    first = drawn(1)
    assert drawn(1) == first
    assert drawn(2) != first
    for generator in range(3):
        assert len({row[generator] for row in first}) == 8, "two workers drew the same numbers"


def test_a_collated_batch_is_kept_with_its_ids_on_the_host() -> None:
    class Ready:
        def __len__(self) -> int:
            return 8

        def __getitems__(self, ids: np.ndarray) -> torch.Tensor:
            return torch.as_tensor(ids) * 10

    loader = build_loader(DatasetWithIds(Ready()), GlobalBatchSampler(8, 4, 0), num_workers=0, seed=0)
    for ids, batch in loader:
        assert isinstance(ids, np.ndarray)
        assert batch.tolist() == (ids * 10).tolist()
