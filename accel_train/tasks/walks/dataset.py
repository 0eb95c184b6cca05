"""Training samples cut from stored walks."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from accel_train.data.windows import StreamDataset


class WalkDataset(StreamDataset):
    """Walks cut into non-overlapping chunks of ``context_length + 1`` tokens.

    A walk of ``L`` tokens gives ``L // (context_length + 1)`` samples; its remainder is not used.
    The first ``context_length`` tokens of a chunk are the input, the last ones the target.
    The stream is all walks, one after the other.

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
        self.context_length, self.stream_length = context_length, walks.size
        self.chunks_per_walk: int = walks.shape[1] // chunk
        # Splitting the last axis gives a view, even where a remainder is cut off.
        self._chunks = walks[:, : self.chunks_per_walk * chunk].reshape(len(walks), self.chunks_per_walk, chunk)
        self._walks = walks

    def __len__(self) -> int:
        return len(self._chunks) * self.chunks_per_walk

    def read(self, first: int, last: int) -> npt.NDArray[np.int64]:
        """Return tokens ``first`` to ``last`` (exclusive) of the stream, int64."""
        length = self._walks.shape[1]
        row = first // length
        rows = self._walks[row : -(-last // length)].reshape(-1)
        return np.array(rows[first - row * length : last - row * length], dtype=np.int64)

    def starts(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the position in the stream of the first token of each of these samples, ``(batch,)``."""
        self._check_ids(ids)
        walk, chunk = np.divmod(ids, self.chunks_per_walk)
        starts: npt.NDArray[np.int64] = walk * self._walks.shape[1] + chunk * (self.context_length + 1)
        return starts

    def _gather(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        walk, chunk = np.divmod(ids, self.chunks_per_walk)
        return np.array(self._chunks[walk, chunk], dtype=np.int64)
