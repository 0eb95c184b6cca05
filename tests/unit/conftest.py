"""A model and a dataset small enough that a failure can be read by eye."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))


class TinyLM(nn.Module):
    """Embedding, dropout, linear: logits ``(batch, time, vocabulary)``."""

    def __init__(self, vocab: int = 11, width: int = 8, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.drop = nn.Dropout(dropout)
        self.out = nn.Linear(width, vocab)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.out(self.drop(self.embed(tokens)))


class TinyDataset:
    """``count`` random sequences as ``(inputs, targets)``, served one by one."""

    def __init__(self, count: int = 40, length: int = 5, vocab: int = 11, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.tokens = torch.randint(0, vocab, (count, length + 1), generator=generator)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.tokens[i, :-1], self.tokens[i, 1:]


@pytest.fixture
def tiny_model():
    def make(dropout: float = 0.0, seed: int = 0) -> TinyLM:
        torch.manual_seed(seed)
        return TinyLM(dropout=dropout)

    return make


@pytest.fixture
def tiny_dataset():
    return TinyDataset
