"""A run that is resumed on another number of processes: the same samples, the same losses, nothing else changed."""

from __future__ import annotations

from pathlib import Path

import pytest
from faults import check_intact, configured, fault, slow, train, undisturbed
from harness import TINY, metrics, outcome, record, run_dir

from accel_train.process import fault_points

TOLERANCE = 1e-4
"""Nats: other slices of a batch are summed in another order."""
STEPS = 60
STEPS_PER_LAUNCH = 20
"""After which a launch is killed, counted from where it started."""


def train_on(worlds: tuple[int, ...], directory: Path, *layers: dict) -> Path:
    """Launch on each number of processes in turn, every launch but the last killed after a while."""
    config, results = configured(directory, *layers)
    for number, world in enumerate(worlds[:-1]):
        mark = directory / f"killed-{number}"
        train(config, world, expect=None, FAULT=fault(fault_points.STEP_DONE, mark, number=STEPS_PER_LAUNCH))
        assert mark.exists()
        check_intact(results)
    train(config, worlds[-1])
    return results


def check_consumed_the_same(results: Path, expected: dict, worlds: tuple[int, ...]) -> None:
    found, provenance = record(results), record(results)["provenance"]
    assert found["status"] == "completed"
    assert provenance["data_fingerprint"] == expected["fingerprint"]
    assert provenance["world_sizes"] == list(worlds)
    assert [resume["world_size"] for resume in provenance["resumes"]] == list(worlds[1:])
    assert provenance["launches"] == len(worlds)
    # The global batch is the same: as many steps, tokens and evaluations as without a change.
    assert outcome(results)["checkpoint"] == expected["checkpoint"] == f"step_{STEPS:07d}"
    assert len(found["curves"]["train_loss"]) == len(expected["curves"]["train_loss"]) == STEPS
    tokens = {line["step"]: line["tokens_seen"] for line in metrics(results) if "tokens_seen" in line}
    assert tokens == {line["step"]: line["tokens_seen"] for line in expected["log"] if "tokens_seen" in line}
    batch, context = TINY["training"]["batch_size"], TINY["model"]["max_seq_len"]
    assert found["metrics"]["scalars"]["tokens_seen"] == STEPS * batch * context
    evaluations = [line["step"] for line in metrics(results) if "gate_passed" in line]
    assert evaluations == [20, 40, 60]


CASES = [((1, 2), 1), ((1, 2), 2), ((2, 1, 2), 1), ((2, 1, 2), 2), ((3, 2), 1), ((2, 3, 1), 2)]
QUICK = {((1, 2), 1)}


@pytest.mark.parametrize(
    ("worlds", "accumulation"), [pytest.param(*c, marks=() if c in QUICK else slow) for c in CASES]
)
def test_another_number_of_processes_changes_neither_the_samples_nor_the_losses(
    tmp_path: Path, worlds: tuple[int, ...], accumulation: int
) -> None:
    layers = {"model": {"dropout": 0.0}, "training": {"gradient_accumulation_steps": accumulation}}
    expected = undisturbed(worlds[0], tmp_path, layers)

    results = train_on(worlds, tmp_path, layers)

    check_consumed_the_same(results, expected, worlds)
    losses, theirs = (curves["train_loss"] for curves in (record(results)["curves"], expected["curves"]))
    assert losses == pytest.approx(theirs, abs=TOLERANCE, rel=0)
    assert losses[-1] < losses[0] - 0.1, "losses that stand still would agree whatever was trained on"


@pytest.mark.slow
@pytest.mark.parametrize("worlds", [(1, 2), (2, 1)])
def test_with_dropout_new_ranks_derive_their_random_states_and_say_so(tmp_path: Path, worlds: tuple[int, ...]) -> None:
    expected = undisturbed(worlds[0], tmp_path)
    results = train_on(worlds, tmp_path)
    check_consumed_the_same(results, expected, worlds)
    log = (run_dir(results) / "logs" / "rank_0.log").read_text()
    derived = log.count("ranks that are new start with random states derived from seed, step and rank")
    assert derived == (1 if worlds[1] > worlds[0] else 0)
    losses, theirs = (curves["train_loss"] for curves in (record(results)["curves"], expected["curves"]))
    assert losses[-1] < losses[0] - 0.1
    assert losses[-10:] != theirs[-10:], "dropout draws other numbers on other ranks"


@pytest.mark.slow
def test_a_number_of_processes_that_does_not_divide_the_batch_is_refused_and_nothing_is_touched(tmp_path: Path) -> None:
    config, results = configured(tmp_path, {"training": {"batch_size": 10}})
    mark = tmp_path / "killed"
    train(config, 2, expect=None, FAULT=fault(fault_points.STEP_DONE, mark, number=STEPS_PER_LAUNCH))
    assert mark.exists()
    before = (run_dir(results) / "result.json").read_bytes()
    output = train(config, 3, expect=2)
    assert "is not divisible by 3 processes x 1 accumulation steps" in output
    assert (run_dir(results) / "result.json").read_bytes() == before
    train(config, 2)
    assert record(results)["provenance"]["world_sizes"] == [2, 2]
