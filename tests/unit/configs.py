"""Configurations made of sections as objects."""

from typing import Any

from accel_train.config.sections import ExperimentConfig
from accel_train.tasks.registry import config_class


def experiment_config(**values: Any) -> ExperimentConfig:
    """Return a configuration of the task that ``values`` name, from sections as objects."""
    return config_class(values.get("task", ExperimentConfig.task))(**values)
