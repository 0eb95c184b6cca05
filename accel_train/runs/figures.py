"""Figures from a run's record, for people. Written once, at the end of a run.

The object interface of matplotlib is used throughout: no global state, no window system.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from accel_train.tasks.base import Task
from accel_train.tasks.drawing import BLUE, dress, numbers, say_empty

_MOST_POINTS = 4000


def training_curves(task: Task, record: Mapping[str, Any], path: Path) -> None:
    """Draw ``path`` (PNG): training loss per step on the left, what the task draws on the right.

    Args:
        task: of the run.
        record: of the run, as JSON values; curves may be short or empty, and values may be missing (null).
        path: its directory is created.
    """
    figure = Figure(figsize=(11, 4.2), layout="constrained", dpi=130)
    left, right = figure.subplots(1, 2)
    figure.suptitle(f"{record['experiment_id']}   {_verdict(record)}", fontsize=11)
    _draw_loss(left, record["curves"]["train_loss"])
    task.draw(right, record)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean of the last ``window`` values (fewer at the start) at every position; NaN where one is NaN."""
    means, total, bad = [], 0.0, 0
    for index, value in enumerate(values):
        entering, leaving = value, values[index - window] if index >= window else 0.0
        total += (0.0 if math.isnan(entering) else entering) - (0.0 if math.isnan(leaving) else leaving)
        bad += math.isnan(entering) - math.isnan(leaving)
        means.append(math.nan if bad else total / min(index + 1, window))
    return means


def _draw_loss(axes: Axes, train_loss: Sequence[float | None]) -> None:
    axes.set(title="Training loss", xlabel="step", ylabel="cross-entropy (nats per token)")
    dress(axes)
    if not train_loss:
        say_empty(axes, "no step was taken")
        return
    losses = numbers(train_loss)
    steps = list(range(1, len(losses) + 1))
    window = len(losses) // 50 if len(losses) >= 250 else 1
    means = running_mean(losses, window)
    # More points than pixels only thicken the line and the file.
    stride = max(1, len(losses) // _MOST_POINTS)
    if window == 1:
        axes.plot(steps, losses, color=BLUE, marker="." if len(losses) < 30 else "", linewidth=1.6)
    else:
        axes.plot(steps[::stride], losses[::stride], color=BLUE, alpha=0.3, linewidth=0.7, label="each step")
        axes.plot(steps[::stride], means[::stride], color=BLUE, linewidth=1.8, label=f"mean of the last {window} steps")
        axes.legend(loc="upper right", frameon=False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _verdict(record: Mapping[str, Any]) -> str:
    gate = record["gate"]
    if gate["passed"]:
        return f"gate passed after epoch {gate['epoch']}"
    return "gate not judged" if gate["passed"] is None else "gate not passed"
