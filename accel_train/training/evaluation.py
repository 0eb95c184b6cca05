"""The mean loss of a held-out dataset, measured by all ranks together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import nn

from accel_train.data.loader import DatasetWithIds
from accel_train.ranks.accelerator import preserved_random_state
from accel_train.training.losses import count_targets


@dataclass(frozen=True)
class Share:
    """Which batches are this rank's, and how it speaks with the others."""

    rank: int
    world_size: int
    batch_size: int
    """Samples of a batch; the same for any number of ranks."""
    after_round: Callable[[], None]
    """Called by every rank after every round of batches; leaves by an exception, if at all, on all ranks."""
    gather: Callable[[Any], Sequence[Any]]
    """Every rank's value, in rank order."""


def mean_loss(
    model: nn.Module,
    dataset: DatasetWithIds,
    loss_fn: Callable[[nn.Module, Any], torch.Tensor],
    device: torch.device,
    share: Share,
) -> float:
    """Mean loss per target over all of ``dataset``, in evaluation mode, each target counted once.

    Batches are dealt to the ranks in turn. A rank without a batch in the last round computes the first one
    and does not count it, so that no rank waits in a collective of the model by itself.

    Args:
        model: wrapped or not; left in training mode.
        dataset: a last batch may be smaller.
        loss_fn: mean over the targets of a batch.
        device: where the batches go.
        share: this rank's part.

    Returns:
        The same number on every rank.
    """
    batches = -(-len(dataset) // share.batch_size)
    total = torch.zeros((), dtype=torch.float64, device=device)
    targets = 0
    model.eval()
    try:
        with torch.no_grad(), preserved_random_state(device):
            for first in range(0, batches, share.world_size):
                number = first + share.rank
                start = number * share.batch_size if number < batches else 0
                _, batch = dataset.__getitems__(np.arange(start, min(start + share.batch_size, len(dataset))))
                loss = loss_fn(model, send_to_device(batch, device))
                if number < batches:
                    count = count_targets(batch)
                    total += loss.double() * count
                    targets += count
                share.after_round()
    finally:
        model.train()
    sums = share.gather([float(total), targets])
    return float(sum(part for part, _ in sums) / max(sum(count for _, count in sums), 1))
