"""An update hook that makes one rank's training non-finite at the step named in the environment.

``POISON`` holds JSON: ``kind`` (``parameter``, ``loss``), ``step`` (0-based), ``rank`` and ``mark``
(a file that proves that it came). Without ``POISON`` the hook does nothing, so a poisoned run and
a clean one have the same configuration.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path

from torch import nn

PARAMETER = "blocks.1.feed_forward.up.weight"


def from_environment(model: nn.Module) -> Callable:
    described = json.loads(os.environ.get("POISON", "null"))
    if described is None or described["rank"] != int(os.environ.get("RANK", "0")):
        return lambda _step, _gradients: None
    spoil, mark = {"parameter": _spoil_parameter, "loss": _spoil_loss}[described["kind"]], Path(described["mark"])

    def hook(step, _gradients):
        if step == described["step"]:
            mark.touch()
            spoil(model)

    return hook


def _spoil_parameter(model: nn.Module) -> None:
    """As a bit flip in memory would: no gradient was bad."""
    model.get_parameter(PARAMETER)[0, 0] = math.nan


def _spoil_loss(model: nn.Module) -> None:
    """From the next step on the loss, which the model itself returns, is infinite; this rank's gradients are not."""

    def infinite(module, _inputs, loss):
        return loss + math.inf if module.training else loss

    model.register_forward_hook(infinite)
