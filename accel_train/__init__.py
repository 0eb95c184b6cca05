"""A trainer for small transformer language models that survives any kill with the same bits.

The public names are imported when they are first used, so that ``import accel_train`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accel_train.config.sections import CheckpointConfig, ModelConfig, TrainingConfig
    from accel_train.errors import Preempted
    from accel_train.model.transformer import TransformerLM
    from accel_train.runs.listing import load_sufficient_runs
    from accel_train.runs.use import load_model
    from accel_train.training.callbacks import Callback
    from accel_train.training.trainer import Trainer

__version__ = "0.1.0"
__all__ = [
    "Callback",
    "CheckpointConfig",
    "ModelConfig",
    "Preempted",
    "Trainer",
    "TrainingConfig",
    "TransformerLM",
    "load_model",
    "load_sufficient_runs",
]
_MODULES = {
    "config.sections": ("CheckpointConfig", "ModelConfig", "TrainingConfig"),
    "errors": ("Preempted",),
    "model.transformer": ("TransformerLM",),
    "runs.listing": ("load_sufficient_runs",),
    "runs.use": ("load_model",),
    "training.callbacks": ("Callback",),
    "training.trainer": ("Trainer",),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
