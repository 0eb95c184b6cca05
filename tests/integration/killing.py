"""Update hooks that end their process when the step named in the environment comes."""

from __future__ import annotations

import os
import signal
from pathlib import Path


def at_step(_model):
    """SIGKILL at the 0-based step ``KILL_AT_STEP``, of rank ``KILL_RANK`` if given; ``KILL_MARK`` proves it."""
    chosen = os.environ.get("KILL_RANK") in {None, os.environ.get("RANK", "0")}
    fatal = int(os.environ.get("KILL_AT_STEP", "-1")) if chosen else -1

    def hook(step, _gradients):
        if step == fatal:
            Path(os.environ["KILL_MARK"]).touch()
            os.kill(os.getpid(), signal.SIGKILL)

    return hook


def politely(_model):
    """SIGTERM at the 0-based step ``STOP_AT_STEP``."""
    last = int(os.environ.get("STOP_AT_STEP", "-1"))

    def hook(step, _gradients):
        if step == last:
            os.kill(os.getpid(), signal.SIGTERM)

    return hook
