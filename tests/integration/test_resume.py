"""A run that was killed ends with the bits of one that was left alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import TINY, outcome, record, run, write_config
from warm import fork

HOOKS = {"hooks": {"update": ["killing:at_step"]}}


@pytest.mark.parametrize("world", [1, 2, 3])
def test_sigkill_in_mid_epoch_changes_no_bit(tmp_path: Path, world: int) -> None:
    """Killed twice within the second epoch and once in the third, with dropout; two processes under a launcher."""
    train = run if world == 2 else fork
    left_alone = write_config(tmp_path / "a.yaml", TINY, HOOKS, {"output_dir": str(tmp_path / "a")})
    killed = write_config(tmp_path / "b.yaml", TINY, HOOKS, {"output_dir": str(tmp_path / "b")})
    train(left_alone, world)

    for step in (25, 31, 50):
        mark = tmp_path / f"killed at {step}"
        output = train(killed, world, expect=None, KILL_AT_STEP=str(step), KILL_MARK=str(mark))
        assert mark.exists(), output
        assert record(tmp_path / "b")["status"] == "running"
    train(killed, world)

    expected, found = outcome(tmp_path / "a"), outcome(tmp_path / "b")
    assert found["checkpoint"] == "step_0000060"
    assert found == expected
    after = record(tmp_path / "b")
    resumed = [resume["step"] for resume in after["provenance"]["resumes"]]
    # A checkpoint every 3 steps; the newest may still have been in flight.
    assert all(step in {newest, newest - 3} for step, newest in zip(resumed, (24, 30, 48), strict=True)), resumed
    assert after["provenance"]["world_sizes"] == [world] * 4
    steps = [line["step"] for line in found["log"] if "loss" in line]
    assert steps == sorted(set(steps)), "a line stands twice in metrics.jsonl"


def test_sigkill_changes_no_bit_under_accumulation_and_evaluation_within_epochs(tmp_path: Path) -> None:
    """Two processes, two micro-steps a step, an evaluation every seven steps; killed between two of them."""
    mode = {"training": {"gradient_accumulation_steps": 2, "eval_interval": 7}}
    left_alone = write_config(tmp_path / "a.yaml", TINY, HOOKS, mode, {"output_dir": str(tmp_path / "a")})
    killed = write_config(tmp_path / "b.yaml", TINY, HOOKS, mode, {"output_dir": str(tmp_path / "b")})
    fork(left_alone, 2)
    mark = tmp_path / "killed"
    fork(killed, 2, expect=None, KILL_AT_STEP="32", KILL_MARK=str(mark))
    assert mark.exists()
    fork(killed, 2)
    assert outcome(tmp_path / "b") == outcome(tmp_path / "a")
    assert len(record(tmp_path / "a")["curves"]["rule_compliance"]) == 60 // 7 + 1


def test_one_and_two_processes_consume_the_same_data_and_agree_on_the_losses(tmp_path: Path) -> None:
    no_dropout = {"model": {"dropout": 0.0}}
    for world in (1, 2):
        out = {"output_dir": str(tmp_path / str(world))}
        fork(write_config(tmp_path / f"{world}.yaml", TINY, no_dropout, out), world)
    one, two = record(tmp_path / "1"), record(tmp_path / "2")
    assert one["provenance"]["data_fingerprint"] == two["provenance"]["data_fingerprint"]
    assert two["provenance"]["world_sizes"] == [2]
    assert two["curves"]["train_loss"] == pytest.approx(one["curves"]["train_loss"], abs=1e-3)
