"""Files of checkpoints are damaged between two launches: it is found, named, and costs a few steps at most."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from faults import accel_train, check_finished_like, complaint, slow, train, undisturbed
from harness import record, run_dir

from accel_train.checkpoints.manifest import MANIFEST, list_checkpoints, verify

FILES = (
    "config.yaml",
    "losses.safetensors",
    MANIFEST,
    "model.safetensors",
    "optimizer.bin",
    "random_states_0.pkl",
    "scheduler.bin",
    "state.json",
)


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def empty(file: Path) -> None:
    os.truncate(file, 0)


def flip_one_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def delete(file: Path) -> None:
    file.unlink()


DAMAGES = (truncate, empty, flip_one_bit, delete)
QUICK = {("optimizer.bin", flip_one_bit)}
MATRIX = [
    pytest.param(name, damage, marks=() if (name, damage) in QUICK else slow, id=f"{damage.__name__}-{name}")
    for name in FILES
    for damage in DAMAGES
]


def committed(results: Path) -> list[tuple[int, Path]]:
    return list_checkpoints(run_dir(results) / "checkpoints")


def set_aside(results: Path) -> list[str]:
    """Names, without the nonces, of the checkpoints that a launch has put aside."""
    return sorted(path.name.rpartition("-")[0] for path in (run_dir(results) / "checkpoints").glob(".damaged-*"))


@pytest.mark.parametrize(("name", "damage"), MATRIX)
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_used(tmp_path: Path, killed_run, name, damage) -> None:
    expected = undisturbed(0, tmp_path)
    config, results = killed_run(0, tmp_path)
    *_, (before, _), (_, newest) = committed(results)
    assert {file.name for file in newest.iterdir()} == set(FILES), "every file has its turn"
    assert verify(newest) == []
    damage(newest / name)

    output = train(config, 0)

    warning = next(line for line in output.splitlines() if f"damaged checkpoint {newest.name}: " in line)
    assert name in warning
    assert warning.removeprefix("accel-train: warning: ") in (run_dir(results) / "logs" / "rank_0.log").read_text()
    assert set_aside(results) == [f".damaged-{newest.name}"]
    check_finished_like(results, expected)
    assert [resume["step"] for resume in record(results)["provenance"]["resumes"]] == [before]


@slow
def test_a_checkpoint_under_the_name_of_a_later_step_is_not_used(tmp_path: Path, killed_run) -> None:
    expected = undisturbed(0, tmp_path)
    config, results = killed_run(0, tmp_path)
    *_, (before, _), (step, newest) = committed(results)
    newest.rename(newest.with_name("step_0000099"))

    output = train(config, 0)

    assert f"damaged checkpoint step_0000099: {MANIFEST} is of step {step}\n" in output
    check_finished_like(results, expected)
    assert [resume["step"] for resume in record(results)["provenance"]["resumes"]] == [before]


@slow
def test_two_ranks_fall_back_to_the_same_checkpoint(tmp_path: Path, killed_run) -> None:
    expected = undisturbed(2, tmp_path)
    config, results = killed_run(2, tmp_path)
    *_, (before, _), (_, newest) = committed(results)
    for file in newest.iterdir():
        empty(file)

    train(config, 2)

    for rank in (0, 1):
        assert f"resumed at step {before}\n" in (run_dir(results) / "logs" / f"rank_{rank}.log").read_text()
    assert set_aside(results) == [f".damaged-{newest.name}"]
    check_finished_like(results, expected)


@slow
@pytest.mark.parametrize("world", [0, 2])
def test_when_all_are_damaged_a_restart_must_be_asked_for(tmp_path: Path, killed_run, world: int) -> None:
    expected = undisturbed(world, tmp_path)
    config, results = killed_run(world, tmp_path)
    found = committed(results)
    for (_, path), damage in zip(found, [flip_one_bit, truncate, delete], strict=False):
        damage(path / "model.safetensors")

    # Twice: the first refusal must not clear the way for a silent restart.
    for _ in range(2):
        line = complaint(train(config, world, expect=1))
        for _, path in found:
            assert f"{path.name}: model.safetensors" in line
        assert "--on_damage restart" in line
        assert committed(results) == found
        assert set_aside(results) == []
        assert record(results)["status"] == "failed"
        assert all(path.name in record(results)["reason"] for _, path in found)

    output = train(config, world, "--on_damage", "restart")

    assert "every checkpoint is damaged: they are set aside and training starts over at step 0" in output
    assert set_aside(results) == [f".damaged-{path.name}" for _, path in found]
    check_finished_like(results, expected, launches=4)
    assert record(results)["provenance"]["resumes"] == []


@slow
@pytest.mark.parametrize("name", ["random_states_0.pkl", MANIFEST])
@pytest.mark.parametrize("damage", DAMAGES)
def test_the_list_of_checkpoints_names_the_damaged_one(tmp_path: Path, killed_run, name, damage) -> None:
    _, results = killed_run(0, tmp_path)
    run, found = run_dir(results), committed(results)
    quick, thorough = accel_train("checkpoints", run), accel_train("checkpoints", run, "--verify")
    assert (quick.code, quick.out.count("sizes agree")) == (0, len(found))
    assert (thorough.code, thorough.out.count("sound")) == (0, len(found))

    newest = found[-1][1]
    damage(newest / name)
    quick, thorough = accel_train("checkpoints", run), accel_train("checkpoints", run, "--verify")

    # Sizes do not betray a flipped bit; but the manifest is read in any case, and knows its own digest.
    overlooked = damage is flip_one_bit and name != MANIFEST
    assert quick.code == (0 if overlooked else 1)
    assert thorough.code == 1
    for shown, finds_it in ((quick, not overlooked), (thorough, True)):
        *sound, last = shown.out.splitlines()[1:]
        assert last.startswith(newest.name)
        assert (name in last) == finds_it
        assert all(row.endswith(("sizes agree", "sound")) for row in sound)


@slow
def test_the_list_of_checkpoints_shows_what_was_set_aside(tmp_path: Path, killed_run) -> None:
    config, results = killed_run(0, tmp_path)
    newest = committed(results)[-1][1]
    shutil.copy(newest / "scheduler.bin", newest / "optimizer.bin")
    train(config, 0)

    shown = accel_train("checkpoints", run_dir(results), "--verify")

    assert shown.code == 0, "what is in use is sound"
    *sound, last = shown.out.splitlines()[1:]
    assert all(row.endswith("sound") for row in sound)
    assert last.startswith(f".damaged-{newest.name}-")
    assert last.endswith("set aside as damaged")
