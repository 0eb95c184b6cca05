"""How large a model is, and about how much memory its training takes."""

from __future__ import annotations

import psutil
import torch

from accel_train.config.sections import ExperimentConfig, ModelConfig
from accel_train.model.kernels.cross_entropy import CHUNK_ELEMENTS

_FLOAT_BYTES = 4
_PROGRAM_BYTES = 400_000_000
"""Python, torch and what they load."""


def parameters(model: ModelConfig, vocab_size: int) -> int:
    """Trained weights of a :class:`~accel_train.model.transformer.TransformerLM` of this size; tied ones count once."""
    width, inner = model.d_model, model.feed_forward_width
    attention = 4 * width * width + 4 * width
    feed_forward = 2 * width * inner + inner + width
    block = attention + feed_forward + 4 * width
    tables = vocab_size * width * (1 if model.tie_embeddings else 2)
    positions = model.max_seq_len * width if model.positions == "learned" else 0
    return model.n_layers * block + tables + positions + 2 * width


def training_bytes(config: ExperimentConfig, vocab_size: int) -> int:
    """About the memory of one training process: weights, gradients, moments, activations, in float32.

    Activations are what the backward pass of each block reads: its norms, projections and
    feed-forward layer; attention weights are never stored whole.
    """
    model, training = config.model, config.training
    tokens = training.batch_size // training.gradient_accumulation_steps * model.max_seq_len
    per_block = 11 * model.d_model + 2 * model.feed_forward_width
    logits = min(tokens * vocab_size, CHUNK_ELEMENTS) if config.task == "text" else tokens * vocab_size
    activations = tokens * (model.n_layers * per_block + 4 * model.d_model) + 3 * logits
    return _PROGRAM_BYTES + _FLOAT_BYTES * (4 * parameters(model, vocab_size) + activations)


def warnings(config: ExperimentConfig, vocab_size: int) -> list[str]:
    """What to tell somebody whose training will hardly fit into this machine's memory; nothing with a GPU."""
    needed, free = training_bytes(config, vocab_size), psutil.virtual_memory().available
    if torch.cuda.is_available() or needed < free:
        return []
    return [
        f"training needs about {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free: use a smaller "
        "training.batch_size, model.max_seq_len or model"
    ]
