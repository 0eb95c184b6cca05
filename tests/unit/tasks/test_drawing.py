"""What the drawings of all tasks share."""

from __future__ import annotations

import math
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from accel_train.tasks import drawing


def record(curves: dict[str, Any], interval: int | None = None, **thresholds: float) -> dict[str, Any]:
    criteria = [{"metric": metric, "threshold": value} for metric, value in thresholds.items()]
    return {
        "config": {"training": {"eval_interval": interval}},
        "curves": curves,
        "gate": {"criteria": criteria},
    }


@pytest.fixture
def axes() -> Axes:
    return Figure().add_subplot()


def test_missing_numbers_are_nan():
    first, second = drawing.numbers([None, 1])
    assert math.isnan(first)
    assert second == 1.0


@pytest.mark.parametrize(("interval", "unit"), [(None, "epoch"), (5, "evaluation")])
def test_the_axis_is_named_by_what_sets_evaluations_off(axes, interval, unit):
    drawing.curves(axes, record({"a": [1.0]}, interval), {"a": "first"})
    assert axes.get_xlabel() == unit


def test_every_metric_has_a_curve_counted_from_one(axes):
    count = drawing.curves(axes, record({"a": [1.0, 2.0], "b": [3.0]}), {"a": "first", "b": "second"})
    assert count == 2
    assert [(line.get_label(), list(line.get_xdata())) for line in axes.lines] == [("first", [1, 2]), ("second", [1])]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["first", "second"]


def test_curves_have_colours_of_their_own(axes):
    names = dict.fromkeys("abcde", "x")
    drawing.curves(axes, record({name: [1.0] for name in names}), names)
    assert len({line.get_color() for line in axes.lines}) == 5


def test_thresholds_are_dashed_in_the_colour_of_their_curve(axes):
    drawing.curves(axes, record({"a": [1.0], "b": [2.0]}, b=0.5, c=0.7), {"a": "first", "b": "second"})
    dashed = [line for line in axes.lines if line.get_linestyle() == "--"]
    second = next(line for line in axes.lines if line.get_label() == "second")
    assert [(line.get_ydata()[0], line.get_color()) for line in dashed] == [(0.5, second.get_color())]


@pytest.mark.parametrize("curves", [{}, {"a": None}, {"a": []}])
def test_without_an_evaluation_the_axes_say_so(axes, curves):
    assert drawing.curves(axes, record(curves, a=0.5), {"a": "first"}) == 0
    assert [text.get_text() for text in axes.texts] == ["no evaluation yet"]
    assert axes.get_legend() is None


def test_all_evaluations_fit_between_the_edges(axes):
    drawing.curves(axes, record({"a": [1.0] * 40}), {"a": "first"})
    assert axes.get_xlim() == (0.5, 40.5)


def test_empty_axes_say_what_is_missing(axes):
    drawing.say_empty(axes, "nothing here")
    assert axes.texts[0].get_text() == "nothing here"
    assert list(axes.get_xticks()) == []
