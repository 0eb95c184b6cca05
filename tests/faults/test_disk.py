"""The disk is full, read-only or forbidden at one moment of a run: a clear error, and the run can go on."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from faults import (
    SCRIPT,
    Mount,
    check_finished_like,
    check_no_traceback,
    complaint,
    configured,
    fault,
    filled,
    slow,
    train,
    undisturbed,
)
from harness import command, environment, kill_tree, record, run_dir

from accel_train.checkpoints.manifest import list_checkpoints, verify
from accel_train.process.fault_points import COMMIT_BEGUN, CORPUS_BEGUN, CORPUS_BUILT, EVALUATION_BEGUN, SAVE_BEGUN

# The ninth save comes after step 24: one every 3 steps, one after the 20 steps of an epoch.
NINTH, FAILED_STEP, STEP_BEFORE = 9, 24, 21
# A rank that waits in vain for another would do so for longer than the test has time.
PATIENT: dict[str, Any] = {"training": {"timeout_seconds": 600}, "name": "run"}


def launch_with_fault(config: Path, world: int, injected: str, prefix: tuple[str, ...] = ()) -> str:
    """The output of a launch that must end with exit code 1, all its ranks in good time."""
    line = [*prefix, *command(config, world, script=SCRIPT)]
    process = subprocess.Popen(
        line,
        env=environment(FAULT=injected),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        kill_tree(process.pid)
        raise
    assert process.returncode == 1, output
    return output


def check_says_what_was_not_saved(output: str, results: Path) -> None:
    """Which step, where, and how much is free; and the checkpoint before it is sound."""
    check_no_traceback(output)
    where = re.escape(str(run_dir(results) / "checkpoints"))
    line = (
        rf"accel-train: error: the checkpoint of step {FAILED_STEP} could not be written to {where} \(\d+ MB free\): "
    )
    assert len(re.findall(line, output)) == 1, output
    assert "earlier checkpoints are intact" in output
    found = list_checkpoints(run_dir(results) / "checkpoints")
    assert [step for step, _ in found][-1] == STEP_BEFORE
    assert [verify(path) for _, path in found] == [[]] * len(found)
    assert record(results)["status"] in {"running", "failed"}, "whole, and not completed"


def check_goes_on_from_there(config: Path, results: Path, world: int, expected: dict[str, Any]) -> None:
    train(config, world)
    check_finished_like(results, expected)
    assert [resume["step"] for resume in record(results)["provenance"]["resumes"]] == [STEP_BEFORE]


@pytest.mark.parametrize(
    ("world", "point"),
    [
        (0, SAVE_BEGUN),
        pytest.param(0, COMMIT_BEGUN, marks=slow),
        pytest.param(2, SAVE_BEGUN, marks=slow),
        pytest.param(2, COMMIT_BEGUN, marks=slow),
    ],
)
def test_a_disk_that_is_full_when_a_checkpoint_is_written(tmp_path: Path, disk: Path, world: int, point: str) -> None:
    expected = undisturbed(world, tmp_path)
    config, results = configured(tmp_path, PATIENT, {"output_dir": str(disk / "results")})
    results = disk / "results"
    mark = tmp_path / "filled"

    output = launch_with_fault(config, world, fault(point, mark, number=NINTH, do="run", command=filled(disk)))

    assert mark.exists()
    check_says_what_was_not_saved(output, results)
    (disk / "ballast").unlink()
    check_goes_on_from_there(config, results, world, expected)


@slow
@pytest.mark.parametrize("world", [0, 2])
def test_a_checkpoint_directory_that_becomes_read_only(tmp_path: Path, mount: Mount, world: int) -> None:
    expected = undisturbed(world, tmp_path)
    config, results = configured(tmp_path, PATIENT)
    directory = results / "run" / "checkpoints"
    directory.mkdir(parents=True)
    mount(directory, "--bind", directory)
    mark = tmp_path / "remounted"
    # Refused as long as the other rank has a file open for writing there.
    remount = f"for _ in {{1..500}}; do mount -o remount,bind,ro '{directory}' && exit; sleep 0.01; done; exit 1"

    output = launch_with_fault(
        config,
        world,
        fault(SAVE_BEGUN, mark, number=NINTH, do="run", command=remount),
    )

    assert mark.exists()
    check_says_what_was_not_saved(output, results)
    assert "Read-only file system" in output
    assert record(results)["status"] == "failed"
    subprocess.run(["mount", "-o", "remount,bind,rw", directory], check=True)
    check_goes_on_from_there(config, results, world, expected)


@slow
@pytest.mark.parametrize("point", [SAVE_BEGUN, COMMIT_BEGUN])
def test_a_checkpoint_directory_that_may_no_longer_be_written(tmp_path: Path, point: str) -> None:
    expected = undisturbed(0, tmp_path)
    config, results = configured(tmp_path, PATIENT)
    directory, mark = results / "run" / "checkpoints", tmp_path / "forbidden"
    prefix: tuple[str, ...] = ()
    if os.geteuid() == 0:
        # Permission bits stop root too, once it has lost the privilege to override them.
        if shutil.which("setpriv") is None:
            pytest.skip("needs setpriv, to be stopped by permission bits as root")
        prefix = ("setpriv", "--bounding-set", "-dac_override,-dac_read_search")

    output = launch_with_fault(
        config, 0, fault(point, mark, number=NINTH, do="run", command=f"chmod a-w '{directory}'"), prefix
    )

    assert mark.exists()
    check_says_what_was_not_saved(output, results)
    assert "Permission denied" in output
    assert record(results)["status"] == "failed"
    directory.chmod(0o755)
    check_goes_on_from_there(config, results, 0, expected)


@slow
@pytest.mark.parametrize("world", [0, 2])
def test_a_disk_that_is_full_when_the_record_is_written(tmp_path: Path, world: int) -> None:
    expected = undisturbed(world, tmp_path)
    config, results = configured(tmp_path, PATIENT)
    mark = tmp_path / "full"
    # What the record is written to before it takes its place is now a device that is always full.
    full = f"ln -s /dev/full '{results}/run/.result.json.tmp'"

    output = launch_with_fault(config, world, fault(EVALUATION_BEGUN, mark, number=2, do="run", command=full))

    assert mark.exists()
    line = complaint(output)
    assert "No space left on device" in line
    assert str(results / "run" / "result.json") in line
    assert record(results)["status"] == "failed"
    train(config, world)
    check_finished_like(results, expected)
    assert [resume["step"] for resume in record(results)["provenance"]["resumes"]] == [40]


@slow
@pytest.mark.parametrize("point", [CORPUS_BEGUN, CORPUS_BUILT])
def test_a_disk_that_is_full_when_the_corpus_is_built(tmp_path: Path, disk: Path, point: str) -> None:
    expected = undisturbed(0, tmp_path)
    config, _ = configured(tmp_path, PATIENT, {"output_dir": str(disk / "results")})
    results, mark = disk / "results", tmp_path / "filled"

    output = launch_with_fault(config, 0, fault(point, mark, do="run", command=filled(disk)))

    assert mark.exists()
    check_no_traceback(output)
    line = next(line for line in output.splitlines() if line.startswith("accel-train: error: "))
    assert re.search(rf"{re.escape(str(results / 'corpora'))}/walks-\w+ could not be built \(\d+ MB free\): .*", line)
    assert "No space left on device" in line
    assert [path.name for path in (results / "corpora").iterdir() if path.is_dir()] == [], "nothing half-built"
    (disk / "ballast").unlink()
    assert "walks of 17 built as" in train(config, 0)
    check_finished_like(results, expected)
