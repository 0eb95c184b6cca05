"""The right half of a text run's figure: losses on held-out and on training windows per evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from accel_train.tasks.drawing import BLUE, GREY, ORANGE, curve, evaluations, finish, numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_validation(axes: Axes, record: Mapping[str, Any]) -> None:
    """Draw the validation loss and the loss on training windows, with the threshold where it is near.

    Args:
        axes: where to draw.
        record: of a run of the text task; curves may be short or missing.
    """
    curves = record["curves"]
    axes.set(title="Validation", xlabel=evaluations(record), ylabel="cross-entropy (nats per token)")
    held_out, seen = numbers(curves.get("val_loss", [])), numbers(curves.get("probe_loss", []))
    finish(axes, len(held_out))
    if not held_out:
        return
    curve(axes, seen, BLUE, "o", "training windows")
    curve(axes, held_out, ORANGE, "s", "held-out windows")
    bits = numbers(curves["val_bits_per_byte"])[-1]
    last, text = (len(held_out), held_out[-1]), f"{held_out[-1]:.3f} nats per token\n{bits:.3f} bits per byte"
    axes.annotate(text, last, xytext=(0, 14), textcoords="offset points", ha="right", fontsize=8, color=ORANGE)
    threshold = record["config"]["text"]["gate"]["val_loss_threshold"]
    low, high = axes.get_ylim()
    if threshold is not None and low < threshold < high:
        axes.axhline(threshold, color=GREY, linestyle="--", linewidth=1.1, label=f"asked: below {threshold:g}")
    axes.legend(loc="upper right", frameon=False)
