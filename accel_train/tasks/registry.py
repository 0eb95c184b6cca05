"""Which task a configuration names: a built-in one, or a class of the user's by import path."""

from __future__ import annotations

import difflib

from accel_train.config.fields import import_by_path
from accel_train.config.sections import ExperimentConfig, experiment_class
from accel_train.errors import ConfigError
from accel_train.tasks.base import Task

BUILT_IN = {
    "walks": ("accel_train.tasks.walks.config:WalksConfig", "accel_train.tasks.walks.task:WalksTask"),
    "text": ("accel_train.tasks.text.config:TextConfig", "accel_train.tasks.text.task:TextTask"),
}
"""Section and class by import path, so that a configuration is read without the libraries that its task needs."""


def config_class(task: str) -> type[ExperimentConfig]:
    """Return the configuration class of a task: the common sections and its own.

    Args:
        task: a name in :data:`BUILT_IN`, or ``package.module:Class``.

    Raises:
        ConfigError: there is no such task.
    """
    if task in BUILT_IN:
        return experiment_class(task, import_by_path("task", BUILT_IN[task][0]))
    found = task_class(task)
    return experiment_class(found.name, found.Config)


def build_task(config: ExperimentConfig) -> Task:
    """Return the task of ``config``."""
    return task_class(config.task)(config)


def task_class(task: str) -> type[Task]:
    """Return the class of a task.

    Args:
        task: a name in :data:`BUILT_IN`, or ``package.module:Class``.

    Raises:
        ConfigError: there is no such task, it is not one, or it lacks something that every task has.
    """
    if ":" not in task and task not in BUILT_IN:
        near = difflib.get_close_matches(task, BUILT_IN, n=1)
        cure = f"did you mean {near[0]}?" if near else f"it is {', '.join(BUILT_IN)}, or package.module:Class"
        raise ConfigError("task", task, f"is not a task; {cure}")
    found = import_by_path("task", BUILT_IN[task][1] if task in BUILT_IN else task)
    if not (isinstance(found, type) and issubclass(found, Task)):
        raise ConfigError("task", task, f"is no {Task.__module__}.{Task.__name__}; derive the class from that")
    kinds = {"name": str, "Config": type}
    missing = [name for name, kind in kinds.items() if not isinstance(getattr(found, name, None), kind)]
    if missing := [*missing, *sorted(found.__abstractmethods__)]:
        raise ConfigError("task", task, f"has no {', no '.join(missing)}; see {Task.__module__}.{Task.__name__}")
    return found
