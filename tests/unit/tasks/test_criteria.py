"""Criteria and verdicts."""

from __future__ import annotations

import math

import pytest

from accel_train.tasks.criteria import Criterion, judge


@pytest.mark.parametrize(
    ("op", "value", "holds"),
    [(">", 0.8, False), (">", 0.81, True), (">=", 0.8, True), ("<", 0.8, False), ("<", 0.7, True), ("<=", 0.8, True)],
)
def test_a_criterion_compares_with_its_threshold(op, value, holds):
    assert Criterion("m", op, 0.8).holds(value) is holds


@pytest.mark.parametrize("value", [None, math.nan])
@pytest.mark.parametrize("op", [">", ">=", "<", "<="])
def test_what_was_not_measured_holds_nothing(op, value):
    assert not Criterion("m", op, 0.0).holds(value)


def test_a_gate_passes_only_when_every_criterion_holds():
    criteria = [Criterion("edge", ">", 0.95), Criterion("rule", ">", 0.8)]
    assert judge(criteria, {"edge": 0.99, "rule": 0.9}).passed
    failed = judge(criteria, {"edge": 0.99, "rule": 0.5})
    assert not failed.passed
    assert failed.failure_reason == "rule is 0.5000, needs > 0.8"
    assert [row["passed"] for row in failed.criteria] == [True, False]


def test_a_gate_that_asks_nothing_does_not_pass():
    verdict = judge([], {"rule": 1.0})
    assert not verdict.passed
    assert verdict.failure_reason == "nothing is asked: set a threshold"


def test_thin_evidence_fails_a_gate_whose_figures_are_perfect():
    verdict = judge([Criterion("rule", ">", 0.8)], {"rule": 1.0}, too_thin=["too few rule checks: 3"])
    assert not verdict.passed
    assert verdict.criteria[0]["passed"]
    assert verdict.failure_reason == "too few rule checks: 3"


def test_an_unknown_metric_could_not_be_measured():
    verdict = judge([Criterion("rule", ">", 0.8)], {})
    assert verdict.failure_reason == "rule could not be measured, needs > 0.8"
