"""A short storm; ``make storm`` is the long one."""

from __future__ import annotations

from pathlib import Path

import pytest
from storm import storm


@pytest.mark.parametrize("world", [1, 2])
def test_five_random_kills_cost_no_bit_and_hardly_a_step(tmp_path: Path, world: int) -> None:
    report = storm(tmp_path, world, kills=5, seed=2, epochs=4, say=print)
    assert report.broken == []
    assert report.kills == 5
    assert report.kills > report.phases["before training"], "no kill hit a run that trained"
    assert report.equal == report.runs >= 1
