"""The right half of the figure of a text run."""

from __future__ import annotations

from typing import Any

import pytest
from configs import experiment_config
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from accel_train.config.fields import to_dict
from accel_train.tasks.text.config import GateConfig, TextConfig
from accel_train.tasks.text.figures import draw_validation


def record(held_out: list[float], seen: list[float], threshold: float | None = 5.0) -> dict[str, Any]:
    config = experiment_config(task="text", text=TextConfig(gate=GateConfig(val_loss_threshold=threshold)))
    bits = [loss / 2 for loss in held_out]
    curves = {"val_loss": held_out, "probe_loss": seen, "val_bits_per_byte": bits} if held_out else {}
    return {"config": to_dict(config), "curves": curves}


@pytest.fixture
def axes() -> Axes:
    return Figure().add_subplot()


def named(axes: Axes) -> dict[str, list[float]]:
    return {str(line.get_label()): list(line.get_ydata()) for line in axes.lines}


def test_losses_on_both_parts_stand_over_the_evaluations(axes):
    draw_validation(axes, record([6.0, 4.0], [5.5, 3.5]))
    assert named(axes)["held-out windows"] == [6.0, 4.0]
    assert named(axes)["training windows"] == [5.5, 3.5]


def test_the_last_loss_is_written_in_both_units(axes):
    draw_validation(axes, record([6.0, 4.0], [5.5, 3.5]))
    assert axes.texts[0].get_text() == "4.000 nats per token\n2.000 bits per byte"


@pytest.mark.parametrize(("threshold", "drawn"), [(5.0, True), (1.0, False), (9.0, False), (None, False)])
def test_the_threshold_is_drawn_where_it_is_near(axes, threshold, drawn):
    draw_validation(axes, record([6.0, 4.0], [5.5, 3.5], threshold))
    assert any(name.startswith("asked: below") for name in named(axes)) is drawn


def test_without_an_evaluation_the_figure_says_so(axes):
    draw_validation(axes, record([], []))
    assert [text.get_text() for text in axes.texts] == ["no evaluation yet"]
    assert axes.get_legend() is None
