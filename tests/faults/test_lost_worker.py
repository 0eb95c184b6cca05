"""A worker or the launcher killed from outside: the others leave in time and say who is gone; the rerun is the same."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from faults import (
    SCRIPT,
    check_finished_like,
    check_intact,
    configured,
    fault,
    ranks_of,
    signalled,
    slow,
    start,
    start_ranks,
    train,
    undisturbed,
)
from harness import command, descendants, environment, kill_tree, record, run_dir, wait_for

from accel_train.process import fault_points

TIMEOUT = 8
GRACE = 10
"""Seconds beside the timeout: the last call, the pause of the fault, the end of the interpreters."""
NO_ORPHAN_AFTER = 10

# Where the run stands still when the worker dies: (point, number, rank; None: the victim itself).
SCENES = {
    "training": (fault_points.STEP_DONE, 25, None),
    "evaluation": (fault_points.EVALUATION_BEGUN, 2, 0),
    "commit": (fault_points.COMMIT_BEGUN, 9, 0),
    "corpus": (fault_points.CORPUS_BEGUN, 1, 0),
}
CASES = [
    *[(scene, victim, 2, False) for scene in SCENES for victim in (0, 1)],
    *[("training", victim, 2, True) for victim in (0, 1)],
    ("evaluation", 1, 2, True),
    *[(scene, 2, 3, False) for scene in ("training", "commit")],
]
QUICK = {("training", 1, 2, False)}


@pytest.mark.parametrize(
    ("scene", "victim", "world", "launcher"), [pytest.param(*c, marks=() if c in QUICK else slow) for c in CASES]
)
def test_the_others_leave_in_time_and_name_the_worker_that_was_killed(
    tmp_path: Path, scene: str, victim: int, world: int, launcher: bool
) -> None:
    expected = undisturbed(world, tmp_path)
    config, results = configured(tmp_path)
    mark = tmp_path / "paused"
    point, number, where = SCENES[scene]
    # Survivors pause for less than the grace; the victim never gets further.
    seconds = 60 if where is None else 3
    pause = fault(point, mark, "pause", number=number, rank=victim if where is None else where, seconds=seconds)
    begin = start if launcher else start_ranks
    begun = begin(config, world, "--training.timeout_seconds", str(TIMEOUT), FAULT=pause)
    processes = begun if isinstance(begun, list) else [begun]
    try:
        wait_for(lambda: mark.exists() or any(p.poll() is not None for p in processes), f"{scene} to be reached")
        assert mark.exists(), [p.communicate()[0] for p in processes if p.poll() is not None]
        family = [psutil.Process(p.pid) for p in processes] + [c for p in processes for c in descendants(p.pid)]
        ranks = ranks_of(family)
        assert sorted(ranks) == list(range(world))
        killed_at = time.monotonic()
        ranks[victim].kill()
        outputs = [p.communicate(timeout=TIMEOUT + GRACE)[0] for p in processes]
        _, alive = psutil.wait_procs(family, timeout=TIMEOUT + GRACE - (time.monotonic() - killed_at))
        assert not alive, f"left behind: {alive}"
    finally:
        for process in processes:
            if process.poll() is None:
                kill_tree(process.pid)

    codes = [p.returncode for p in processes]
    if launcher:
        assert codes == [1]
    else:
        assert codes == [-signal.SIGKILL if rank == victim else 1 for rank in range(world)], outputs
    named = re.compile(rf"rank {victim} (does not answer any more|is gone|has been silent|did not arrive)")
    if victim != 0:
        assert named.search(outputs[0]), f"rank 0 tells the terminal: {outputs[0]}"
    for rank in set(range(world)) - {victim}:
        assert named.search((run_dir(results) / "logs" / f"rank_{rank}.log").read_text())
    assert record(results)["status"] == "running"
    check_intact(results)

    train(config, world)
    check_finished_like(results, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scene", "world"), [("training", 1), ("training", 2), ("evaluation", 2), ("commit", 2), ("corpus", 1)]
)
def test_a_launcher_that_is_killed_leaves_no_orphan_and_a_preempted_run(tmp_path: Path, world: int, scene: str) -> None:
    expected = undisturbed(world, tmp_path)
    config, results = configured(tmp_path)
    mark = tmp_path / "paused"
    point, number, _ = SCENES[scene]
    process = start(config, world, FAULT=fault(point, mark, "pause", number=number, seconds=2))
    wait_for(lambda: mark.exists() or process.poll() is not None, f"{scene} to be reached")
    assert process.poll() is None, process.communicate()[0]

    end = signalled(process, lambda launcher, _workers: launcher.kill())

    assert end.code == -signal.SIGKILL
    assert end.seconds < NO_ORPHAN_AFTER, end.output
    assert record(results)["status"] == "preempted", end.output
    check_intact(results)
    train(config, world)
    check_finished_like(results, expected)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_a_launcher_that_is_killed_during_start_up_leaves_no_orphan_and_no_harm(tmp_path: Path, world: int) -> None:
    expected = undisturbed(world, tmp_path)
    config, results = configured(tmp_path)
    process = start(config, world)
    wait_for(lambda: len(_trainers(process)) == world or process.poll() is not None, "the workers")

    def kill_the_launcher(launcher: subprocess.Popen[str], workers: list[psutil.Process]) -> None:
        assert len(workers) >= world
        assert not results.exists(), "this early nothing is written"
        launcher.kill()

    end = signalled(process, kill_the_launcher)

    assert end.code == -signal.SIGKILL
    assert end.seconds < NO_ORPHAN_AFTER, end.output
    written = list(results.glob("*/result.json"))
    assert not written or record(results)["status"] == "preempted"
    train(config, world)
    check_finished_like(results, expected, launches=1 + len(written))


ADOPTING = """
import ctypes, os, subprocess, sys
PR_SET_CHILD_SUBREAPER = 36
ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
print(subprocess.Popen(sys.argv[1:]).pid, flush=True)
try:
    while True:
        os.wait()
except ChildProcessError:
    print("nobody left")
"""
"""Starts a command and adopts its orphans, as ``systemd --user`` and the shims of containers do."""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="adoption of orphans is a feature of Linux")
@pytest.mark.parametrize("world", [1, 2])
def test_orphans_that_another_process_than_1_adopts_are_orphans_too(tmp_path: Path, world: int) -> None:
    expected = undisturbed(world, tmp_path)
    config, results = configured(tmp_path)
    mark = tmp_path / "paused"
    process = subprocess.Popen(
        [sys.executable, "-c", ADOPTING, *command(config, world, script=SCRIPT)],
        env=environment(FAULT=fault(fault_points.STEP_DONE, mark, "pause", number=25, seconds=2)),
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    launcher = int(process.stdout.readline())
    wait_for(lambda: mark.exists() or process.poll() is not None, "training")

    end = signalled(process, lambda *_: os.kill(launcher, signal.SIGKILL))

    assert end.output.endswith("nobody left\n"), end.output
    assert end.seconds < NO_ORPHAN_AFTER
    assert record(results)["status"] == "preempted"
    train(config, world)
    check_finished_like(results, expected)


ALONE = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
"""What follows becomes process 1, as the command of a container is."""


def _can_isolate() -> bool:
    return shutil.which("unshare") is not None and subprocess.run([*ALONE, "true"], check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not _can_isolate(), reason="needs the right to make a process namespace")
@pytest.mark.parametrize("world", [1, 2])
def test_a_launcher_that_is_process_1_of_a_container_is_not_taken_for_a_dead_one(tmp_path: Path, world: int) -> None:
    """Orphans are adopted by process 1, so having it for a parent looks the same."""
    config, results = configured(tmp_path)
    isolated = [*ALONE, *command(config, world, script=SCRIPT)]
    done = subprocess.run(isolated, env=environment(), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    check_finished_like(results, undisturbed(world, tmp_path), launches=1)


def _trainers(launcher: subprocess.Popen[str]) -> list[psutil.Process]:
    found = []
    for process in descendants(launcher.pid):
        try:
            if process.ppid() == launcher.pid and str(SCRIPT) in process.cmdline():
                found.append(process)
        except psutil.Error:
            continue
    return found
