"""What a forward pass may return beside the logits, for later analysis.

The extras are computed beside the attention that makes the logits, never instead of it, so
every mode gives the same logits bit for bit. Training runs with ``NONE``, which costs nothing.
"""

from __future__ import annotations

from enum import Flag, auto
from typing import NamedTuple

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
    """Logits and the extracted tensors; a tuple is empty where its mode was not asked for."""

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
