"""Training data that lies on the GPU: each step sends the positions of its samples, not their tokens.

A corpus of walks or text is some hundred megabytes of tokens. A batch that is gathered on the host is
copied to the device as 64-bit integers in every step; from a stream on the device it is gathered there.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from accel_train.data.windows import StreamDataset

_TOKENS_AT_ONCE = 1 << 22
_MAX_FRACTION_OF_FREE_MEMORY = 0.25


class SamplesOnDevice:
    """The samples of a dataset, gathered from a copy of its stream on a device (int32, 4 bytes a token).

    Args:
        dataset: the dataset to copy.
        device: the device to copy it to.
    """

    def __init__(self, dataset: StreamDataset, device: torch.device) -> None:
        self._dataset, self._device = dataset, device
        self._stream = torch.empty(dataset.stream_length, dtype=torch.int32, device=device)
        for first in range(0, dataset.stream_length, _TOKENS_AT_ONCE):
            last = min(first + _TOKENS_AT_ONCE, dataset.stream_length)
            self._stream[first:last] = torch.from_numpy(dataset.read(first, last).astype(np.int32))
        self._offsets = torch.arange(dataset.context_length + 1, device=device)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitems__(self, ids: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Return inputs and targets, int64 ``(batch, context_length)`` each, on the device; wait for nothing.

        Raises:
            IndexError: an id is out of range.
        """
        starts = torch.from_numpy(self._dataset.starts(ids))
        if self._device.type == "cuda":
            # Torch keeps pinned memory until the copy is made.
            starts = starts.pin_memory()
        starts = starts.to(self._device, non_blocking=True)
        tokens = self._stream[starts[:, None] + self._offsets].long()
        return tokens[:, :-1], tokens[:, 1:]


def copy_to_device(dataset: Any, device: torch.device) -> SamplesOnDevice | None:
    """Copy ``dataset`` to a GPU.

    Returns:
        The copy; None if ``device`` is no GPU, ``dataset`` is no :class:`~accel_train.data.windows.StreamDataset`, or
        the copy would take more than a quarter of the free memory.
    """
    if device.type != "cuda" or not isinstance(dataset, StreamDataset):
        return None
    free, _ = torch.cuda.mem_get_info(device)
    fits = 4 * dataset.stream_length <= _MAX_FRACTION_OF_FREE_MEMORY * free
    return SamplesOnDevice(dataset, device) if fits else None
