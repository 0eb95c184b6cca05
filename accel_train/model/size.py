"""How many parameters a model has, and about how much memory its training takes."""

from __future__ import annotations

import psutil
import torch
from torch import nn

from accel_train.config.sections import ModelConfig, TrainingConfig
from accel_train.model.kernels.cross_entropy import CHUNK_ELEMENTS

_FLOAT_BYTES = 4
_PROGRAM_BYTES = 400_000_000
"""Python, torch and the libraries that they load."""


def count_parameters(module: nn.Module) -> int:
    """Return the number of parameters of ``module``; tied ones count once."""
    return sum(parameter.numel() for parameter in module.parameters())


def transformer_parameters(model: ModelConfig, vocab_size: int) -> int:
    """Return :func:`count_parameters` of a :class:`~accel_train.model.transformer.TransformerLM` without making it."""
    width, inner = model.d_model, model.feed_forward_width
    attention = 4 * width * width + 4 * width
    feed_forward = 2 * width * inner + inner + width
    block = attention + feed_forward + 4 * width
    tables = vocab_size * width * (1 if model.tie_embeddings else 2)
    positions = model.max_seq_len * width if model.positions == "learned" else 0
    return model.n_layers * block + tables + positions + 2 * width


def training_bytes(model: ModelConfig, training: TrainingConfig, vocab_size: int) -> int:
    """Estimate the memory of one training process in bytes: weights, gradients, moments, activations, in float32.

    Activations are what the backward pass of each block reads: its norms, projections and feed-forward layer.
    Attention weights are not counted, and of the logits only the part that the fused loss holds at a time.
    """
    tokens = training.batch_size // training.gradient_accumulation_steps * model.max_seq_len
    per_block = 11 * model.d_model + 2 * model.feed_forward_width
    logits = min(tokens * vocab_size, CHUNK_ELEMENTS["cpu"])
    activations = tokens * (model.n_layers * per_block + 4 * model.d_model) + 3 * logits
    return _PROGRAM_BYTES + _FLOAT_BYTES * (4 * transformer_parameters(model, vocab_size) + activations)


def warnings(model: ModelConfig, training: TrainingConfig, vocab_size: int) -> list[str]:
    """Return a warning if training is likely to exceed this machine's free memory; none where there is a GPU."""
    needed, free = training_bytes(model, training, vocab_size), psutil.virtual_memory().available
    if torch.cuda.is_available() or needed < free:
        return []
    return [
        f"training needs about {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free: use a smaller "
        "training.batch_size, model.max_seq_len or model"
    ]


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out, on any device: torch raises a plain ``RuntimeError`` on the CPU."""
    on_cpu = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    return on_cpu or isinstance(error, MemoryError | torch.OutOfMemoryError)
