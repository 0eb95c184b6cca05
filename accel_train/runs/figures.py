"""Figures from a run's record, for people. Written once, at the end of a run.

The object interface of matplotlib is used throughout: no global state, no window system.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

_BLUE, _ORANGE, _GREY = "#1f5fa8", "#d1690e", "#666666"
_MOST_POINTS = 4000


def training_curves(record: Mapping[str, Any], path: Path) -> None:
    """Draw ``path`` (PNG): training loss per step; compliance (walks) or validation loss (text) per evaluation.

    Args:
        record: a run's record; curves may be short or empty, and values may be missing (null).
        path: its directory is created.
    """
    figure = Figure(figsize=(11, 4.2), layout="constrained", dpi=130)
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    figure.suptitle(f"{record['experiment_id']}   {_verdict(record)}", fontsize=11)
    _draw_loss(left, record["curves"]["train_loss"])
    if record["config"]["task"] == "text":
        _draw_validation(right, record)
    else:
        _draw_compliance(right, record)
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
    if not train_loss:
        _say_empty(axes, "no step was taken")
        _dress(axes)
        return
    losses = _numbers(train_loss)
    steps = list(range(1, len(losses) + 1))
    window = len(losses) // 50 if len(losses) >= 250 else 1
    means = running_mean(losses, window)
    # More points than pixels only thicken the line and the file.
    stride = max(1, len(losses) // _MOST_POINTS)
    marker = "." if len(losses) < 30 else ""
    if window == 1:
        axes.plot(steps, losses, color=_BLUE, marker=marker, linewidth=1.6)
    else:
        axes.plot(steps[::stride], losses[::stride], color=_BLUE, alpha=0.3, linewidth=0.7, label="each step")
        axes.plot(
            steps[::stride], means[::stride], color=_BLUE, linewidth=1.8, label=f"mean of the last {window} steps"
        )
        axes.legend(loc="upper right", frameon=False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    _dress(axes)


def _draw_compliance(axes: Axes, record: Mapping[str, Any]) -> None:
    curves, gate = record["curves"], record["config"]["gate"]
    in_steps = record["config"]["training"]["eval_interval"] is not None
    name = "evaluation" if in_steps else "epoch"
    axes.set(title="Greedy compliance", xlabel=name, ylabel="share of checks passed", ylim=(-0.02, 1.05))
    count = 0
    lowest = 1.0
    for label, color, marker in (("edge", _BLUE, "o"), ("rule", _ORANGE, "s")):
        values = _numbers(curves[f"{label}_compliance"])
        threshold = gate[f"{label}_threshold"]
        axes.axhline(threshold, color=color, linestyle="--", linewidth=1.1, alpha=0.8)
        axes.text(
            1.01,  # outside the axes, where no curve passes
            threshold,
            f"{label} > {threshold:g}",
            transform=axes.get_yaxis_transform(),
            va="center",
            fontsize=8,
            color=color,
        )
        if values:
            axes.plot(
                range(1, len(values) + 1),
                values,
                color=color,
                marker=marker,
                markersize=5 if len(values) <= 30 else 3,
                linewidth=1.8,
                label=f"{label} compliance",
            )
        count = max(count, len(values))
        lowest = min([lowest, *(value for value in values if not math.isnan(value))])
    if count == 0:
        _say_empty(axes, "no evaluation yet")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_xlim(0.5, count + 0.5)
        if record["gate"]["passed"] and not in_steps:
            axes.axvline(record["gate"]["epoch"], color=_GREY, linestyle=":", linewidth=1.2, label="gate passed")
        # Where the lines leave room: they rise, so below them on the right unless they start high.
        axes.legend(loc="lower right" if lowest < 0.9 else "lower left", framealpha=1.0, edgecolor="none")
    _dress(axes)


def _draw_validation(axes: Axes, record: Mapping[str, Any]) -> None:
    curves, config = record["curves"], record["config"]
    in_steps = config["training"]["eval_interval"] is not None
    axes.set(title="Validation", xlabel="evaluation" if in_steps else "epoch", ylabel="cross-entropy (nats per token)")
    held_out, seen = _numbers(curves.get("val_loss", [])), _numbers(curves.get("probe_loss", []))
    if not held_out:
        _say_empty(axes, "no evaluation yet")
        _dress(axes)
        return
    for values, color, marker, label in (
        (seen, _BLUE, "o", "training windows"),
        (held_out, _ORANGE, "s", "held-out windows"),
    ):
        axes.plot(
            range(1, len(values) + 1),
            values,
            color=color,
            marker=marker,
            markersize=5 if len(values) <= 30 else 3,
            linewidth=1.8,
            label=label,
        )
    bits = _numbers(curves["val_bits_per_byte"])[-1]
    axes.annotate(
        f"{held_out[-1]:.3f} nats per token\n{bits:.3f} bits per byte",
        (len(held_out), held_out[-1]),
        xytext=(0, 14),
        textcoords="offset points",
        ha="right",
        fontsize=8,
        color=_ORANGE,
    )
    threshold = config["gate"]["val_loss_threshold"]
    low, high = axes.get_ylim()
    if threshold is not None and low < threshold < high:
        axes.axhline(threshold, color=_GREY, linestyle="--", linewidth=1.1, label=f"asked: below {threshold:g}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlim(0.5, len(held_out) + 0.5)
    axes.legend(loc="upper right", frameon=False)
    _dress(axes)


def _verdict(record: Mapping[str, Any]) -> str:
    gate = record["gate"]
    if gate["passed"]:
        return f"gate passed after epoch {gate['epoch']}"
    return "gate not judged" if gate["passed"] is None else "gate not passed"


def _numbers(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else float(value) for value in values]


def _say_empty(axes: Axes, what: str) -> None:
    axes.text(0.5, 0.5, what, transform=axes.transAxes, ha="center", va="center", color=_GREY)
    axes.set_xticks([])


def _dress(axes: Axes) -> None:
    axes.grid(True, alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
