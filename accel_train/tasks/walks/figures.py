"""The right half of a walk run's figure: compliance per evaluation, with the thresholds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from accel_train.tasks.drawing import BLUE, GREY, ORANGE, curve, evaluations, finish, numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_compliance(axes: Axes, record: Mapping[str, Any]) -> None:
    """Draw greedy edge and rule compliance over the evaluations.

    Args:
        axes: where to draw.
        record: of a run of the walks task; curves may be short or empty.
    """
    gate = record["config"]["walks"]["gate"]
    by_epoch = evaluations(record) == "epoch"
    axes.set(title="Greedy compliance", xlabel=evaluations(record), ylabel="share of checks passed", ylim=(-0.02, 1.05))
    count, lowest = 0, 1.0
    for label, color, marker in (("edge", BLUE, "o"), ("rule", ORANGE, "s")):
        values = numbers(record["curves"][f"{label}_compliance"])
        threshold = gate[f"{label}_threshold"]
        axes.axhline(threshold, color=color, linestyle="--", linewidth=1.1, alpha=0.8)
        name, transform = f"{label} > {threshold:g}", axes.get_yaxis_transform()
        # Outside the axes, where no curve passes.
        axes.text(1.01, threshold, name, transform=transform, va="center", fontsize=8, color=color)
        if values:
            curve(axes, values, color, marker, f"{label} compliance")
        count = max(count, len(values))
        lowest = min([lowest, *(value for value in values if not math.isnan(value))])
    finish(axes, count)
    if count and record["gate"]["passed"] and by_epoch:
        axes.axvline(record["gate"]["epoch"], color=GREY, linestyle=":", linewidth=1.2, label="gate passed")
    if count:
        # Where the lines leave room: they rise, so below them on the right unless they start high.
        axes.legend(loc="lower right" if lowest < 0.9 else "lower left", framealpha=1.0, edgecolor="none")
