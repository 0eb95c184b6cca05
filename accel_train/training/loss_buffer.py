"""Losses and data fingerprint between two log boundaries: the losses on the device, the fingerprint on the host.

Nothing here waits for the device before :meth:`LossBuffer.collect`, which the loop calls once per
log interval and before every checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from accel_train.data.permutation import fingerprint_terms


class LossBuffer:
    """Holds losses and fingerprint until they are collected.

    Args:
        capacity: micro-steps between two collections at most.
        accumulation: micro-steps per step.
        ranks: number of ranks.
        gather: concatenates a tensor over the ranks, in rank order.
        device: where the losses are computed.
    """

    def __init__(
        self, capacity: int, accumulation: int, ranks: int, gather: Callable[[Tensor], Tensor], device: torch.device
    ) -> None:
        self._accumulation, self._ranks, self._gather = accumulation, ranks, gather
        self._losses = torch.zeros(capacity, dtype=torch.float32, device=device)
        self._consumed: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]] = []

    def add(self, loss: Tensor, positions: npt.NDArray[np.int64], ids: npt.NDArray[np.int64]) -> None:
        """Add one micro-step of this rank; nothing is hashed before :meth:`collect`.

        Args:
            loss: mean loss, a scalar on the device.
            positions: ``(local batch,)`` positions in the run's order.
            ids: ``(local batch,)`` samples at these positions.
        """
        self._losses[len(self._consumed)] = loss
        self._consumed.append((positions, ids))

    def collect(self) -> tuple[list[float], int]:
        """Return the mean loss of every step over ranks and micro-steps, and the fingerprint of all ranks.

        Waits for the device; a collective when there are several ranks. Empty when nothing was added.
        """
        if not self._consumed:
            return [], 0
        losses = self._losses[: len(self._consumed)]
        positions, ids = (np.concatenate(arrays) for arrays in zip(*self._consumed, strict=True))
        # The same 64 bits as a signed integer, which every backend can gather.
        term = np.array([fingerprint_terms(positions, ids)], dtype=np.uint64).view(np.int64)
        terms = torch.from_numpy(term).to(losses.device)
        if self._ranks > 1:
            losses, terms = self._gather(losses), self._gather(terms)
        table = losses.cpu().numpy().astype(np.float64).reshape(self._ranks, -1, self._accumulation)
        # Summed in rank order on the host: the order inside an all-reduce depends on its length.
        per_step = np.zeros(table.shape[1])
        for rank in range(self._ranks):
            for micro_step in range(self._accumulation):
                per_step += table[rank, :, micro_step]
        per_step /= self._ranks * self._accumulation
        self._consumed.clear()
        return per_step.tolist(), sum(terms.tolist()) % 2**64
