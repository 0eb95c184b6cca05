"""Training data that lies on the GPU: what travels in a step is the places of its samples.

A corpus of walks or text is some hundred megabytes of tokens. Gathered on the host, every batch of it
is copied to the device as 64-bit integers; from a stream on the device it is gathered there.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_TOKENS_AT_ONCE = 1 << 22
_LARGEST_PART_OF_FREE_MEMORY = 0.25


class StreamSamples(Protocol):
    """Samples that are stretches of one stream of tokens, such as :class:`accel_train.data.windows.WalkDataset`."""

    context_length: int

    @property
    def stream_length(self) -> int:
        """Tokens in the stream."""

    def read(self, first: int, last: int) -> npt.NDArray[np.int64]:
        """Tokens ``first`` to ``last`` (exclusive) of the stream."""

    def starts(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Place in the stream of the first token of each of these samples, ``(batch,)``."""


class ResidentSamples:
    """The samples of a dataset, from a copy of its stream on a device (int32, 4 bytes a token).

    Args:
        dataset: what is copied.
        device: where to.
    """

    def __init__(self, dataset: StreamSamples, device: torch.device) -> None:
        self._dataset, self._device = dataset, device
        self._stream = torch.empty(dataset.stream_length, dtype=torch.int32, device=device)
        for first in range(0, dataset.stream_length, _TOKENS_AT_ONCE):
            last = min(first + _TOKENS_AT_ONCE, dataset.stream_length)
            self._stream[first:last] = torch.from_numpy(dataset.read(first, last).astype(np.int32))
        self._offsets = torch.arange(dataset.context_length + 1, device=device)

    def __len__(self) -> int:
        return len(self._dataset)  # type: ignore[arg-type]

    def __getitems__(self, ids: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Inputs and targets, int64 ``(batch, context_length)`` each, on the device; waits for nothing."""
        starts = torch.from_numpy(self._dataset.starts(ids))
        if self._device.type == "cuda":
            # From pinned memory, which torch keeps until the copy is made.
            starts = starts.pin_memory()
        starts = starts.to(self._device, non_blocking=True)
        tokens = self._stream[starts[:, None] + self._offsets].long()
        return tokens[:, :-1], tokens[:, 1:]


def resident(dataset: Any, device: torch.device) -> ResidentSamples | None:
    """``dataset`` on the GPU ``device``; None where it is no stream of tokens or needs too much of the free memory."""
    if device.type != "cuda" or not hasattr(dataset, "starts"):
        return None
    free, _ = torch.cuda.mem_get_info(device)
    fits = 4 * dataset.stream_length <= _LARGEST_PART_OF_FREE_MEMORY * free
    return ResidentSamples(dataset, device) if fits else None
