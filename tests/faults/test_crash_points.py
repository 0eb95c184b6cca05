"""SIGKILL at every point of a run where it would hurt: the same command finishes with the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest
from faults import EVERY, check_finished_like, check_intact, configured, fault, slow, train, undisturbed
from harness import record, run_dir

from accel_train.checkpoints.manifest import list_checkpoints
from accel_train.process import fault_points

# How often the point is passed before the kill, so that checkpoints exist by then.
LATER = {
    fault_points.STEP_DONE: 25,
    fault_points.EVALUATION_BEGUN: 2,
    fault_points.SAVE_BEGUN: 9,
    fault_points.SAVE_HALF_WRITTEN: 9,
    fault_points.SAVE_WRITTEN: 9,
    fault_points.COMMIT_BEGUN: 9,
    fault_points.COMMIT_SEALED: 9,
    fault_points.COMMIT_RENAMED: 9,
    fault_points.ROTATION_RENAMED: 5,
    fault_points.RECORD_WRITTEN_ASIDE: 3,
}
CASES = [
    # point, number, rank, processes (0: one, without a launcher)
    *[(point, number, 0, 0) for point, number in LATER.items()],
    *[(point, number, 0, 2) for point, number in LATER.items()],
    *[(point, 1, 0, world) for point in (fault_points.CORPUS_BEGUN, fault_points.CORPUS_BUILT) for world in (0, 2)],
    # Before the first checkpoint ever.
    *[
        (point, 1, 0, 2)
        for point in (fault_points.SAVE_HALF_WRITTEN, fault_points.COMMIT_SEALED, fault_points.RECORD_WRITTEN_ASIDE)
    ],
    *[
        (point, LATER[point], 1, 2)
        for point in (fault_points.STEP_DONE, fault_points.SAVE_BEGUN, fault_points.SAVE_WRITTEN)
    ],
    *[(point, LATER[point], 2, 3) for point in (fault_points.STEP_DONE, fault_points.SAVE_WRITTEN)],
    *[(point, LATER[point], 0, 3) for point in (fault_points.EVALUATION_BEGUN, fault_points.COMMIT_SEALED)],
]
FRESH = {
    (fault_points.STEP_DONE, 25, 0, 2),
    (fault_points.EVALUATION_BEGUN, 2, 0, 2),
    (fault_points.COMMIT_SEALED, 9, 0, 2),
    (fault_points.ROTATION_RENAMED, 5, 0, 2),
    (fault_points.RECORD_WRITTEN_ASIDE, 3, 0, 2),
    (fault_points.CORPUS_BEGUN, 1, 0, 2),
    (fault_points.SAVE_WRITTEN, 9, 1, 2),
}
"""These are killed under a launcher; the rest is forked from a warm process."""
QUICK = {(fault_points.SAVE_HALF_WRITTEN, 9, 0, 0), (fault_points.COMMIT_SEALED, 9, 0, 2)}


@pytest.mark.parametrize(
    ("point", "number", "rank", "world"), [pytest.param(*c, marks=() if c in QUICK else slow) for c in CASES]
)
def test_a_run_killed_at_any_point_ends_with_the_same_bits(
    tmp_path: Path, point: str, number: int, rank: int, world: int
) -> None:
    expected = undisturbed(world, tmp_path)
    config, results = configured(tmp_path)
    mark = tmp_path / "killed"

    # How long survivors wait for the dead is another test's.
    short = ("--training.timeout_seconds", "10")
    here = fault(point, mark, number=number, rank=rank)
    fresh = (point, number, rank, world) in FRESH
    output = train(config, world, *short, expect=None, fresh=fresh, FAULT=here)

    assert mark.exists(), f"{point} was never reached: {output}"
    path = run_dir(results)
    before = list_checkpoints(path / "checkpoints")
    if (path / "checkpoints").exists():
        check_intact(results)
    recorded = (path / "result.json").exists()
    if recorded:
        assert record(results)["status"] == "running"
    train(config, world)
    check_finished_like(results, expected, launches=1 + recorded)
    resumes = record(results)["provenance"]["resumes"]
    if before:
        assert resumes[0]["step"] == before[-1][0], "the newest committed checkpoint is where it goes on"
    if point == fault_points.STEP_DONE:
        assert number - resumes[0]["step"] <= 2 * EVERY, "more work lost than the saves in flight"
