"""AdamW as the configuration asks for it, and its learning rate over a run as a pure function of the step."""

from __future__ import annotations

import math

import torch
from torch import nn

from accel_train.config.sections import TrainingConfig


def build_optimizer(model: nn.Module, config: TrainingConfig, device: torch.device) -> torch.optim.AdamW:
    """Return AdamW, fused where the device has the kernel; weight decay on all parameters or on matrices only."""
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


def cosine_with_warmup(step: int, warmup_steps: int, total_steps: int, min_lr_ratio: float = 0.1) -> float:
    """Return the factor on the peak learning rate for step ``step`` (counted from 0).

    Linear warm-up ``(step + 1) / warmup_steps``, so that the first step already learns; half a
    cosine (Loshchilov and Hutter 2017) from the peak at ``warmup_steps`` down to ``min_lr_ratio``
    in the last step, ``total_steps - 1``, where it stays.

    Args:
        step: number of steps done.
        warmup_steps: steps of the warm-up; 0 starts at the peak.
        total_steps: steps of the whole run.
        min_lr_ratio: final factor.

    Returns:
        A factor in ``(0, 1]``, or ``min_lr_ratio`` where that is 0.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min((step - warmup_steps) / max(total_steps - 1 - warmup_steps, 1), 1.0)
    return min_lr_ratio + (1.0 - min_lr_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress))


def warmup_steps(config: TrainingConfig, total_steps: int) -> int:
    """Return the warm-up's steps: ``config.warmup_steps`` if set, else ``config.warmup_ratio`` of the run, rounded."""
    return round(config.warmup_ratio * total_steps) if config.warmup_steps is None else config.warmup_steps
