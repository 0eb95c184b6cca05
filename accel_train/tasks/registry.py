"""Which task a configuration names."""

from __future__ import annotations

from accel_train.config import ExperimentConfig
from accel_train.observer import SILENT, Observer
from accel_train.tasks.base import Task
from accel_train.tasks.text import TextTask
from accel_train.tasks.walks import WalksTask


def build_task(config: ExperimentConfig, observer: Observer = SILENT) -> Task:
    """The task of ``config``."""
    return TextTask(config, observer) if config.task == "text" else WalksTask(config, observer)
