"""Training samples cut from stored token sequences.

A batch is one vectorised gather from the (memory-mapped) array: no Python runs per sample,
and nothing is copied before it is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset


class WalkDataset(Dataset[tuple[Tensor, Tensor]]):
    """Walks cut into non-overlapping chunks of ``context_length + 1`` tokens.

    A walk of ``L`` tokens gives ``L // (context_length + 1)`` samples; the rest of it is not
    used. The first ``context_length`` tokens of a chunk are the input, the last ones the target.

    Args:
        walks: integers ``(num_walks, walk_length)``, an array or a memory map; never copied.
        context_length: tokens in an input.

    Raises:
        ValueError: ``walks`` is not two-dimensional or is too short for one chunk.
    """

    def __init__(self, walks: npt.NDArray[Any], context_length: int) -> None:
        chunk = context_length + 1
        if walks.ndim != 2 or walks.shape[1] < chunk:
            raise ValueError(
                f"walks of shape {walks.shape} do not hold a chunk of context_length + 1 = {chunk} tokens; "
                "they must be (num_walks, walk_length) with longer walks or a shorter context"
            )
        self.context_length = context_length
        self.chunks_per_walk: int = walks.shape[1] // chunk
        # Splitting the last axis keeps this a view, also where a remainder is cut off.
        self._chunks = walks[:, : self.chunks_per_walk * chunk].reshape(len(walks), self.chunks_per_walk, chunk)

    def __len__(self) -> int:
        return len(self._chunks) * self.chunks_per_walk

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """One sample: inputs and targets, int64 ``(context_length,)`` each."""
        inputs, targets = self.__getitems__([index])
        return inputs[0], targets[0]

    def __getitems__(self, ids: npt.NDArray[np.integer[Any]] | Sequence[int]) -> tuple[Tensor, Tensor]:
        """A batch, already collated.

        Args:
            ids: sample ids ``(batch,)``.

        Returns:
            Inputs and targets, int64 ``(batch, context_length)`` each: two views of one tensor.

        Raises:
            IndexError: an id is out of range.
        """
        walk, chunk = np.divmod(np.asarray(ids, dtype=np.int64), self.chunks_per_walk)
        tokens = torch.from_numpy(self._chunks[walk, chunk].astype(np.int64))
        return tokens[:, :-1], tokens[:, 1:]
