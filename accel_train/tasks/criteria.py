"""Criteria and verdicts: one mechanism for every figure that a model is judged by.

A gate is a set of criteria on named metrics. A metric that could not be measured fails its
criterion, and so does a gate whose evidence is too thin: nothing passes by default.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Op = Literal[">", ">=", "<", "<="]

_OPERATORS = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}


@dataclass(frozen=True)
class Criterion:
    """``metric op threshold``, for example ``rule_compliance > 0.8``."""

    metric: str
    op: Op
    threshold: float

    def holds(self, value: float | None) -> bool:
        """Whether ``value`` satisfies the criterion; an unmeasured value (None) or NaN does not."""
        return value is not None and bool(_OPERATORS[self.op](value, self.threshold))


@dataclass(frozen=True)
class Verdict:
    """The outcome of judging one set of metrics."""

    passed: bool
    criteria: list[dict[str, Any]]
    """``{metric, op, threshold, value, passed}`` each."""
    failure_reason: str | None
    """Why it did not pass, one clause per failed criterion; None when it passed."""
    metrics: dict[str, float | None] = field(default_factory=dict)
    evidence: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The verdict as JSON values."""
        return asdict(self)


def judge(
    criteria: Sequence[Criterion],
    metrics: Mapping[str, float | None],
    *,
    evidence: Mapping[str, Any] | None = None,
    too_thin: Sequence[str] = (),
) -> Verdict:
    """Judge ``metrics``: passed when there is a criterion, every one holds, and no evidence is too thin.

    Args:
        criteria: what is asked.
        metrics: measured values; None for what could not be measured.
        evidence: what the values rest on, kept for the record.
        too_thin: reasons why the evidence does not suffice, whatever the values.
    """
    rows, reasons = [], list(too_thin)
    if not criteria:
        reasons.append("nothing is asked: set a threshold")
    for criterion in criteria:
        value = metrics.get(criterion.metric)
        holds = criterion.holds(value)
        rows.append({**asdict(criterion), "value": value, "passed": holds})
        if not holds:
            shown = "could not be measured" if value is None else f"is {value:.4f}"
            reasons.append(f"{criterion.metric} {shown}, needs {criterion.op} {criterion.threshold:g}")
    return Verdict(not reasons, rows, "; ".join(reasons) or None, dict(metrics), dict(evidence or {}))
