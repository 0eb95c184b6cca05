"""``accel-train train``: read the options, then run the experiment."""

from __future__ import annotations

import gc
import importlib
import sys
import types
from collections.abc import Callable, Sequence

from accel_train.config.parse import parse_config
from accel_train.errors import EXIT_PREEMPTED
from accel_train.process.signals import ask_for_sigterm_when_launcher_dies, leaving_on_stop_signals
from accel_train.tasks.registry import config_class

_EXPERIMENT = "accel_train.runs.experiment"


def main(options: Sequence[str], *, command: Sequence[str], reached: Callable[[str], None]) -> int:
    """Train, or resume; returns the exit code.

    Args:
        options: of the command.
        command: the whole command line, for the record.
        reached: hears of every fault point.

    Raises:
        ConfigError: the configuration cannot be run.
    """
    with leaving_on_stop_signals(EXIT_PREEMPTED):
        # Before the seconds of importing torch: a launcher that dies in them takes this process along.
        if ask_for_sigterm_when_launcher_dies():
            return EXIT_PREEMPTED
        config, earlier = parse_config(options, config_class)
        return int(_import_experiment().run(config, earlier=earlier, command=command, reached=reached))


def _import_experiment() -> types.ModuleType:
    """Import what trains; without the collector, which would walk over torch's new objects again and again."""
    if _EXPERIMENT in sys.modules or not gc.isenabled():
        return importlib.import_module(_EXPERIMENT)
    gc.disable()
    try:
        module = importlib.import_module(_EXPERIMENT)
        # They stay to the end: neither collections in training nor forked data workers shall touch them.
        gc.freeze()
    finally:
        gc.enable()
    return module
