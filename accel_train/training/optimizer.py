"""AdamW as the configuration asks for it."""

from __future__ import annotations

import torch
from torch import nn

from accel_train.config.sections import TrainingConfig


def build_optimizer(model: nn.Module, config: TrainingConfig, device: torch.device) -> torch.optim.AdamW:
    """AdamW, fused where the device has the kernel; weight decay on all parameters or on matrices only."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if config.weight_decay_on == "matrices":
        groups = [
            {"params": [p for p in trained if p.dim() >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
        ]
    else:
        groups = [{"params": trained, "weight_decay": config.weight_decay}]
    return torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=device.type in {"cpu", "cuda"}
    )
