"""A trainer for small transformer language models that survives any kill with the same bits.

The public names are imported when they are first used, so that ``import accel_train`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accel_train.config.sections import CheckpointConfig as CheckpointConfig
    from accel_train.config.sections import ModelConfig as ModelConfig
    from accel_train.config.sections import TrainingConfig as TrainingConfig
    from accel_train.errors import Preempted as Preempted
    from accel_train.model.transformer import TransformerLM as TransformerLM
    from accel_train.runs.listing import load_sufficient_runs as load_sufficient_runs
    from accel_train.runs.use import load_model as load_model
    from accel_train.training.callbacks import Callback as Callback
    from accel_train.training.trainer import Trainer as Trainer

__version__ = "0.1.0"
_MODULES = {
    "Callback": "training.callbacks",
    "CheckpointConfig": "config.sections",
    "ModelConfig": "config.sections",
    "Preempted": "errors",
    "Trainer": "training.trainer",
    "TrainingConfig": "config.sections",
    "TransformerLM": "model.transformer",
    "load_model": "runs.use",
    "load_sufficient_runs": "runs.listing",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
