"""What the drawings of all tasks share; matplotlib is imported by whoever makes the figure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE, GREY = "#1f5fa8", "#d1690e", "#666666"
_COLORS = (BLUE, ORANGE, "#2e7d32", "#7b1fa2", GREY)


def numbers(values: Sequence[float | None]) -> list[float]:
    """Return the values with NaN for those that are missing."""
    return [math.nan if value is None else float(value) for value in values]


def evaluations(record: Mapping[str, Any]) -> str:
    """Return the unit of the horizontal axis: ``epoch``, or ``evaluation`` when evaluations go by steps."""
    return "epoch" if record["config"]["training"]["eval_interval"] is None else "evaluation"


def curves(axes: Axes, record: Mapping[str, Any], labels: Mapping[str, str], title: str = "Evaluation") -> int:
    """Draw one curve per metric over the evaluations, and a dashed line at every threshold of the gate on it.

    Args:
        axes: where to draw.
        record: a run's record; curves may be missing or short.
        labels: metric to label.
        title: above the axes.

    Returns:
        How many evaluations there are.
    """
    axes.set(title=title, xlabel=evaluations(record))
    found = {name: numbers(record["curves"].get(name) or []) for name in labels}
    count = max(map(len, found.values()), default=0)
    thresholds = {row["metric"]: row["threshold"] for row in record["gate"]["criteria"]}
    for place, (name, values) in enumerate(found.items()):
        color, marker = _COLORS[place % len(_COLORS)], "os^v"[place % 4]
        if name in thresholds:
            axes.axhline(thresholds[name], color=color, linestyle="--", linewidth=1.1, alpha=0.8)
        if values:
            curve(axes, values, color, marker, labels[name])
    finish(axes, count)
    if count:
        axes.legend(loc="best", framealpha=1.0, edgecolor="none")
    return count


def curve(axes: Axes, values: Sequence[float], color: str, marker: str, label: str) -> None:
    """Draw one curve over the evaluations, counted from 1."""
    size = 5 if len(values) <= 30 else 3
    places = range(1, len(values) + 1)
    axes.plot(places, values, color=color, marker=marker, markersize=size, linewidth=1.8, label=label)


def finish(axes: Axes, count: int) -> None:
    """Whole numbers below the curves of ``count`` evaluations, or a word where there is none; then the grid."""
    if count:
        axes.locator_params(axis="x", integer=True, min_n_ticks=1)
        axes.set_xlim(0.5, count + 0.5)
    else:
        say_empty(axes, "no evaluation yet")
    dress(axes)


def say_empty(axes: Axes, what: str) -> None:
    """Write why there is no curve."""
    axes.text(0.5, 0.5, what, transform=axes.transAxes, ha="center", va="center", color=GREY)
    axes.set_xticks([])


def dress(axes: Axes) -> None:
    """Grid and frame."""
    axes.grid(True, alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
