"""The right half of the figure of a walks run."""

from __future__ import annotations

import math
from typing import Any

import pytest
from configs import experiment_config
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from accel_train.config.fields import to_dict
from accel_train.config.sections import TrainingConfig
from accel_train.tasks.walks.task import WalksTask

TASK = WalksTask(experiment_config())


def record(edge: list[float | None], rule: list[float | None], **changes: Any) -> dict[str, Any]:
    config = to_dict(experiment_config(training=TrainingConfig(eval_interval=changes.pop("eval_interval", None))))
    gate = {"passed": False, "epoch": None, **changes}
    return {"config": config, "curves": {"edge_compliance": edge, "rule_compliance": rule}, "gate": gate}


@pytest.fixture
def axes() -> Axes:
    return Figure().add_subplot()


def labels(axes: Axes) -> list[str]:
    legend = axes.get_legend()
    return [] if legend is None else [text.get_text() for text in legend.get_texts()]


def test_both_curves_stand_over_the_evaluations(axes):
    TASK.draw(axes, record([0.5, 0.9], [0.2, 0.7]))
    drawn = {line.get_label(): line for line in axes.lines}
    assert list(drawn["edge compliance"].get_xdata()) == [1, 2]
    assert list(drawn["rule compliance"].get_ydata()) == [0.2, 0.7]


def test_thresholds_are_drawn_and_named_without_any_evaluation(axes):
    TASK.draw(axes, record([], []))
    dashed = [line.get_ydata()[0] for line in axes.lines if line.get_linestyle() == "--"]
    assert dashed == [0.95, 0.8]
    assert {"edge > 0.95", "rule > 0.8", "no evaluation yet"} <= {text.get_text() for text in axes.texts}
    assert labels(axes) == []


@pytest.mark.parametrize(("interval", "marked"), [(None, True), (5, False)])
def test_the_epoch_of_the_pass_is_marked_on_a_scale_of_epochs(axes, interval, marked):
    TASK.draw(axes, record([1.0, 1.0], [0.5, 0.9], passed=True, epoch=2, eval_interval=interval))
    assert ("gate passed" in labels(axes)) is marked
    assert axes.get_xlabel() == ("epoch" if marked else "evaluation")


def test_a_missing_value_leaves_a_gap(axes):
    TASK.draw(axes, record([None, 0.9], [None, None]))
    edge = next(line for line in axes.lines if line.get_label() == "edge compliance")
    assert [math.isnan(value) for value in edge.get_ydata()] == [True, False]


@pytest.mark.parametrize(("lowest", "place"), [(0.2, "lower right"), (0.95, "lower left")])
def test_the_legend_stands_where_the_curves_leave_room(axes, lowest, place):
    TASK.draw(axes, record([1.0, 1.0], [lowest, 1.0]))
    assert axes.get_legend()._loc == axes.get_legend().codes[place]
