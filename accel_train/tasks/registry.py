"""Which task a configuration names."""

from __future__ import annotations

from accel_train.config.sections import ExperimentConfig
from accel_train.process.fault_points import SILENT, Observer
from accel_train.tasks.base import Task
from accel_train.tasks.text.task import TextTask
from accel_train.tasks.walks.task import WalksTask


def build_task(config: ExperimentConfig, observer: Observer = SILENT) -> Task:
    """The task of ``config``."""
    return TextTask(config, observer) if config.task == "text" else WalksTask(config, observer)
