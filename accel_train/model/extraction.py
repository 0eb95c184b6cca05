"""The tensors that a forward pass can return beside the logits, for later analysis.

They are computed in addition to the attention that makes the logits, never instead of it, so
every mode gives the same logits bit for bit. Training runs with ``NONE``, which costs nothing.
"""

from __future__ import annotations

import math
from enum import Flag, auto
from typing import NamedTuple

import torch
from torch import Tensor


class ExtractionMode(Flag):
    """The tensors to return beside the logits; combine with ``|``."""

    NONE = 0
    """The logits only."""
    SCORES = auto()
    """Attention scores: ``Q K^T / sqrt(head_width)``, before the softmax, ``-inf`` above the diagonal."""
    WEIGHTS = auto()
    """Attention weights: the softmax of the scores, without dropout."""
    VALUES = auto()
    """Value vectors of every head."""
    RESIDUAL = auto()
    """The residual stream."""
    ALL = SCORES | WEIGHTS | VALUES | RESIDUAL
    """All of them."""


class Extraction(NamedTuple):
    """Logits and the extracted tensors; a tuple is empty if the mode does not include it."""

    logits: Tensor
    """``(batch, time, vocab)``."""
    scores: tuple[Tensor, ...] = ()
    """One ``(batch, heads, time, time)`` per block."""
    weights: tuple[Tensor, ...] = ()
    """One ``(batch, heads, time, time)`` per block."""
    values: tuple[Tensor, ...] = ()
    """One ``(batch, heads, time, head_width)`` per block."""
    residual: tuple[Tensor, ...] = ()
    """``n_layers + 1`` of ``(batch, time, d_model)``: the input of every block, then the last output."""


class Recorder:
    """Collects the tensors of an extraction mode during one forward pass."""

    def __init__(self, mode: ExtractionMode) -> None:
        self.mode = mode
        self._recorded: dict[ExtractionMode, list[Tensor]] = {kind: [] for kind in ExtractionMode}

    def record(self, kind: ExtractionMode, tensor: Tensor) -> None:
        """Record a tensor of one kind, of the shape that :class:`Extraction` states, if the mode includes that kind."""
        if self.mode & kind:
            self._recorded[kind].append(tensor)

    def record_attention(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Record one block's attention from query, key and value, ``(batch, heads, time, head_width)`` each."""
        if self.mode & (ExtractionMode.SCORES | ExtractionMode.WEIGHTS):
            time = query.shape[2]
            later = torch.ones(time, time, dtype=torch.bool, device=query.device).triu(1)
            scores = (query @ key.transpose(2, 3) / math.sqrt(query.shape[3])).masked_fill(later, -math.inf)
            self.record(ExtractionMode.SCORES, scores)
            if self.mode & ExtractionMode.WEIGHTS:
                self.record(ExtractionMode.WEIGHTS, scores.softmax(dim=-1))
        self.record(ExtractionMode.VALUES, value)

    def extraction(self, logits: Tensor) -> Extraction:
        """Return all recorded tensors with the logits ``(batch, time, vocab)``."""
        return Extraction(logits, *map(tuple, self._recorded.values()))
