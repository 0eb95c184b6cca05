"""The key-value cache: what attention needs of the tokens already read, kept while a model generates."""

from __future__ import annotations

import torch
from torch import Tensor

from accel_train.config.sections import ModelConfig
from accel_train.model.kernels.distinct_places import distinct_places


class KVCache:
    """Keys and values of the tokens read so far, preallocated for ``capacity`` tokens.

    ``keys`` and ``values`` hold one ``(batch, heads, capacity, head_width)`` tensor per block;
    ``length`` is the number of tokens in them.

    Args:
        config: sizes of the model.
        batch: number of sequences.
        capacity: largest number of tokens per sequence.
        like: gives dtype and device.
    """

    def __init__(self, config: ModelConfig, batch: int, capacity: int, like: Tensor) -> None:
        shape = (batch, config.n_heads, capacity, config.d_model // config.n_heads)
        self.keys = [like.new_empty(shape) for _ in range(config.n_layers)]
        self.values = [like.new_empty(shape) for _ in range(config.n_layers)]
        self.length = 0

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values ``(batch, heads, new, head_width)`` of block ``layer``; return those of all tokens."""
        end = self.length + key.shape[2]
        self.keys[layer][:, :, self.length : end] = key
        self.values[layer][:, :, self.length : end] = value
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]


class StaticCache(KVCache):
    """A cache to which the same kernels add every token, so that a CUDA graph can hold them.

    ``position`` (int64, one element, on the device) is the place of the token that is added. While ``adding`` is
    set, one token is added there, whatever ``length`` says.
    """

    def __init__(self, config: ModelConfig, batch: int, capacity: int, like: Tensor) -> None:
        super().__init__(config, batch, capacity, like)
        for stored in (*self.keys, *self.values):
            stored.zero_()  # an empty place has weight zero, and zero times NaN would be NaN
        self.position = torch.zeros(1, dtype=torch.int64, device=like.device)
        self._places = torch.arange(capacity, device=like.device)
        self.adding = False

    @property
    def visible(self) -> Tensor | None:
        """Bool ``(1, capacity)``, the places that the token being added attends to; None unless ``adding``."""
        return (self._places <= self.position).unsqueeze(0) if self.adding else None

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store as every cache does; while ``adding``, store at ``position`` and return all places."""
        if not self.adding:
            return super().append(layer, key, value)
        with distinct_places():
            for stored, new in ((self.keys[layer], key), (self.values[layer], value)):
                stored.index_copy_(2, self.position, new)
        return self.keys[layer], self.values[layer]
