"""Training samples cut from a stored stream of tokens, on the host or from a copy of it on the GPU.

A batch is one vectorised gather from the (memory-mapped) array: no Python runs per sample,
and only what a batch needs is copied. A batch that is gathered on the host is copied to a GPU as 64-bit integers in
every step. A corpus of walks or text is some hundred megabytes of tokens: with a copy of it on the GPU each step
sends the positions of its samples only.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset


class StreamDataset(Dataset[tuple[Tensor, Tensor]]):
    """Samples that are consecutive tokens of one stream; a whole batch of them is gathered at a time."""

    context_length: int
    """Tokens in an input."""
    stream_length: int
    """Tokens in the stream, including those that no sample uses."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return one sample: inputs and targets, int64 ``(context_length,)`` each."""
        inputs, targets = self.__getitems__([index])
        return inputs[0], targets[0]

    def __getitems__(self, ids: npt.NDArray[np.integer[Any]] | Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return a collated batch.

        Args:
            ids: sample ids ``(batch,)``.

        Returns:
            Inputs and targets, int64 ``(batch, context_length)`` each: two views of one tensor.

        Raises:
            IndexError: an id is out of range.
        """
        tokens = torch.from_numpy(self._gather(np.asarray(ids, dtype=np.int64)))
        return tokens[:, :-1], tokens[:, 1:]

    @abstractmethod
    def read(self, first: int, last: int) -> npt.NDArray[np.int64]:
        """Return tokens ``first`` to ``last`` (exclusive) of the stream, int64."""

    @abstractmethod
    def starts(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the position in the stream of the first token of each of these samples, ``(batch,)``.

        Raises:
            IndexError: an id is out of range.
        """

    @abstractmethod
    def __len__(self) -> int:
        """Number of samples."""

    def _check_ids(self, ids: npt.NDArray[np.int64]) -> None:
        if ids.size and (ids.min() < 0 or ids.max() >= len(self)):
            raise IndexError(f"sample ids must lie in [0, {len(self)}), not [{ids.min()}, {ids.max()}]")

    @abstractmethod
    def _gather(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the tokens of a batch, ``(batch, context_length + 1)``."""


Ranges = npt.NDArray[np.int64]
"""``(ranges, 2)``: first token and the one after the last; ascending and disjoint."""

_BLOCK_WINDOWS = 16
"""Windows in a block, at most."""
_MIN_BLOCKS = 4
"""Blocks of the smaller part, at least: a short stream has smaller blocks."""


def split_corpus(
    num_tokens: int, context_length: int, val_fraction: float = 0.05, how: Literal["tail", "blocks"] = "tail"
) -> tuple[Ranges, Ranges]:
    """Split a stream of tokens into a part for training and one for validation; no token is in both.

    Args:
        num_tokens: length of the stream.
        context_length: tokens of an input; ``blocks`` holds out whole windows.
        val_fraction: held-out fraction, in (0, 1).
        how: ``tail`` holds out the end of the stream. ``blocks`` holds out evenly spread blocks of (at most 16)
            whole windows, so that both parts have what changes along the corpus (its language, its author).

    Returns:
        The ranges of tokens for training and for validation. Either may be empty when the stream is short.
    """
    if how == "tail":
        cut = num_tokens - int(num_tokens * val_fraction)
        return _ranges([0], [cut]), _ranges([cut], [num_tokens])
    share = Fraction(val_fraction).limit_denominator(10_000)
    windows = num_tokens // context_length
    of_smaller_part = int(windows * min(share, 1 - share))
    block = max(1, min(_BLOCK_WINDOWS, of_smaller_part // _MIN_BLOCKS)) * context_length + 1
    starts = np.arange(0, num_tokens, block, dtype=np.int64)
    ends = np.minimum(starts + block, num_tokens)
    # The number of blocks due after each one, rounded: with a tenth these are blocks 5, 15, 25 and so on.
    due = (2 * np.arange(-1, len(starts)) * share.numerator + share.denominator) // (2 * share.denominator)
    # The last block may be cut short: it is never held out, so that all held-out windows are whole.
    held_out = (np.diff(due) == 1) & (ends - starts == block)
    return _ranges(starts[~held_out], ends[~held_out]), _ranges(starts[held_out], ends[held_out])


def _ranges(starts: npt.ArrayLike, ends: npt.ArrayLike) -> Ranges:
    """Return the ranges that are not empty."""
    ranges = np.stack([np.asarray(starts, dtype=np.int64), np.asarray(ends, dtype=np.int64)], axis=1)
    return ranges[ranges[:, 0] < ranges[:, 1]]


class TokenStream(Protocol):
    """Tokens in memory or on disk."""

    def __len__(self) -> int:
        """Number of tokens."""

    def windows(self, starts: npt.NDArray[np.int64], length: int) -> npt.NDArray[np.int64]:
        """Return the ``length`` tokens from each of ``starts`` on, int64 ``(windows, length)``."""


Stream = TokenStream | npt.NDArray[Any]


def count_windows(ranges: Ranges, context_length: int, stride: int | None = None) -> int:
    """Return the number of windows of a :class:`WindowDataset` with these settings."""
    return int(_window_counts(ranges, context_length, context_length if stride is None else stride).sum())


def _window_counts(ranges: Ranges, context_length: int, stride: int) -> npt.NDArray[np.int64]:
    return ((ranges[:, 1] - ranges[:, 0] - context_length - 1) // stride + 1).clip(min=0)


class WindowDataset(StreamDataset):
    """Windows of a stream of tokens: inputs, and targets shifted by one token.

    Inputs overlap only if ``stride`` is less than ``context_length``; by default the last target of a window
    is the first input of the next. The end of a range that is too short for a window is not used.

    Args:
        tokens: a stream, or a one-dimensional array of integers; never copied.
        context_length: tokens in an input.
        ranges: the parts of the stream to use; no window crosses from one into another. Default: all.
        stride: tokens from the start of one window to that of the next. Default: ``context_length``.

    Raises:
        ValueError: no window fits, or a range leaves the stream.
    """

    def __init__(
        self, tokens: Stream, context_length: int, ranges: Ranges | None = None, stride: int | None = None
    ) -> None:
        self._tokens, self.context_length, self.stream_length = tokens, context_length, len(tokens)
        self.stride = context_length if stride is None else stride
        if context_length < 1 or self.stride < 1:
            raise ValueError(f"context_length = {context_length} and stride = {stride} must be at least 1")
        used = _ranges([0], [len(tokens)]) if ranges is None else np.asarray(ranges, dtype=np.int64).reshape(-1, 2)
        if used.size and (used.min() < 0 or used.max() > len(tokens)):
            raise ValueError(f"the ranges reach from {used.min()} to {used.max()}, the stream has {len(tokens)} tokens")
        counts = _window_counts(used, context_length, self.stride)
        self._starts: npt.NDArray[np.int64] = used[:, 0]
        self._first: npt.NDArray[np.int64] = np.concatenate([[0], np.cumsum(counts)])
        if not len(self):
            raise ValueError(
                f"{int((used[:, 1] - used[:, 0]).sum())} tokens in {len(used)} ranges hold no window of "
                f"context_length + 1 = {context_length + 1}; use more text or a shorter context"
            )

    def __len__(self) -> int:
        return int(self._first[-1])

    def read(self, first: int, last: int) -> npt.NDArray[np.int64]:
        """Return tokens ``first`` to ``last`` (exclusive) of the stream, int64."""
        return self._windows(np.array([first], dtype=np.int64), last - first).reshape(-1)

    def starts(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the position in the stream of the first token of each of these windows, ``(batch,)``."""
        self._check_ids(ids)
        index = np.searchsorted(self._first, ids, side="right") - 1
        return self._starts[index] + (ids - self._first[index]) * self.stride

    def _gather(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return self._windows(self.starts(ids), self.context_length + 1)

    def _windows(self, starts: npt.NDArray[np.int64], length: int) -> npt.NDArray[np.int64]:
        if not isinstance(self._tokens, np.ndarray):
            return self._tokens.windows(starts, length)
        return np.asarray(self._tokens[starts[:, None] + np.arange(length)], dtype=np.int64)


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
        The copy; None if ``device`` is no GPU, ``dataset`` is no :class:`StreamDataset`, or
        the copy would take more than a quarter of the free memory.
    """
    if device.type != "cuda" or not isinstance(dataset, StreamDataset):
        return None
    free, _ = torch.cuda.mem_get_info(device)
    fits = 4 * dataset.stream_length <= _MAX_FRACTION_OF_FREE_MEMORY * free
    return SamplesOnDevice(dataset, device) if fits else None
