"""Whether a text goes round in circles."""

from __future__ import annotations

from collections.abc import Sequence


def repetition(tokens: Sequence[int], run: int = 4) -> float:
    """Share of the runs of ``run`` tokens that stood earlier in ``tokens``: 0 in good prose, near 1 in a loop."""
    runs = [tuple(tokens[start : start + run]) for start in range(len(tokens) - run + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0
