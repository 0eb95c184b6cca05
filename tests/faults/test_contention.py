"""Several launches want the same directory: one works, the others wait or leave, and no lock outlives its holder."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from faults import (
    check_finished_like,
    configured,
    fault,
    finish,
    ranks_of,
    read_until,
    slow,
    start,
    train,
    undisturbed,
)
from harness import descendants, kill_tree, run_dir, wait_for

from accel_train.config.sections import SHARED_CORPORA
from accel_train.process import fault_points
from accel_train.runs.lock import OWNER_FILE

STALE_AFTER = 30
"""Seconds without a heartbeat after which the hold of another host has ended."""


@contextmanager
def started(*arguments, **env: str) -> Iterator[subprocess.Popen[str]]:
    """A launch that is gone after the block, whatever happened."""
    process = start(*arguments, **env)
    try:
        yield process
    finally:
        if process.poll() is None:
            kill_tree(process.pid)


def wait_for_mark(mark: Path, process: subprocess.Popen[str]) -> None:
    wait_for(lambda: mark.exists() or process.poll() is not None, "the fault")
    assert mark.exists(), process.communicate()[0]


def lines(output: str, phase: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith(f"{phase} ")]


@pytest.mark.parametrize("world", [pytest.param(1, marks=slow), pytest.param(2, marks=slow)])
def test_of_two_launches_at_once_one_trains_and_the_other_waits_and_finds_the_result(
    tmp_path: Path, world: int
) -> None:
    config, results = configured(tmp_path)
    mark = tmp_path / "paused"
    # Whoever trains stands still for long enough that the other comes to the lock meanwhile.
    pause = fault(fault_points.STEP_DONE, mark, "pause", number=25, seconds=8 * world)
    with started(config, world, FAULT=pause) as one, started(config, world, FAULT=pause) as other:
        outputs = [process.communicate(timeout=120)[0] for process in (one, other)]
        assert [one.returncode, other.returncode] == [0, 0], outputs

    assert mark.exists()
    trained, waited = sorted(outputs, key=lambda output: len(lines(output, "lock")))
    assert lines(trained, "completed")
    assert not lines(trained, "lock")
    assert re.search(r"waiting for process \d+ on host ", lines(waited, "lock")[0])
    assert lines(waited, "finished")
    assert not lines(waited, "training")
    check_finished_like(results, undisturbed(world, tmp_path), launches=1)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2])
def test_a_launch_that_may_not_wait_longer_leaves_with_75_and_names_the_owner(tmp_path: Path, world: int) -> None:
    config, results = configured(tmp_path)
    mark = tmp_path / "paused"
    with started(
        config, world, FAULT=fault(fault_points.STEP_DONE, mark, "pause", number=25, seconds=15 * world)
    ) as first:
        wait_for_mark(mark, first)
        owner = json.loads((run_dir(results) / OWNER_FILE).read_text())
        second = train(config, world, "--start.lock_timeout", "1", expect=75)
        assert first.poll() is None, "the owner must still be there for the test to mean anything"
        assert f"is in use by process {owner['pid']} on host {owner['host']}" in second
        output = finish(first)
        assert first.returncode == 0, output
    check_finished_like(results, undisturbed(world, tmp_path), launches=1)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2])
def test_a_launch_that_waits_goes_on_when_the_one_before_is_killed(tmp_path: Path, world: int) -> None:
    config, results = configured(tmp_path)
    mark = tmp_path / "paused"
    with started(config, world, FAULT=fault(fault_points.STEP_DONE, mark, "pause", number=25, seconds=60)) as first:
        wait_for_mark(mark, first)
        with started(config, world) as second:
            waiting = read_until(second, "waiting for process")
            assert not lines(waiting, "training")
            kill_tree(first.pid)
            output = finish(second)
            assert second.returncode == 0, output
    check_finished_like(results, undisturbed(world, tmp_path))


@pytest.mark.slow
def test_an_immediate_rerun_is_not_held_up_by_the_data_workers_of_a_killed_run(tmp_path: Path) -> None:
    config, results = configured(tmp_path, {"training": {"num_workers": 2}})
    mark = tmp_path / "paused"
    pause = fault(fault_points.STEP_DONE, mark, "pause", number=25, seconds=60)
    with started(config, 0, FAULT=pause) as killed:
        wait_for_mark(mark, killed)
        workers = descendants(killed.pid)
        assert len(workers) == 2
        for worker in workers:
            worker.suspend()  # else they would be gone, as they ought to, before the rerun comes to the lock
        killed.kill()
        killed.wait()
        try:
            output = train(config, 0)
            assert not lines(output, "lock")
            assert all(worker.status() == psutil.STATUS_STOPPED for worker in workers), "they were there all the time"
            for worker in workers:
                worker.resume()
            _, alive = psutil.wait_procs(workers, timeout=20)
            assert not alive, "data-loading workers leave by themselves"
        finally:
            for worker in workers:
                with suppress(psutil.NoSuchProcess):
                    worker.kill()
    check_finished_like(results, undisturbed(1, tmp_path))


@pytest.mark.slow
def test_an_immediate_rerun_waits_for_the_ranks_of_a_killed_launcher(tmp_path: Path) -> None:
    config, results = configured(tmp_path)
    mark = tmp_path / "paused"
    pause = fault(fault_points.STEP_DONE, mark, "pause", number=25, seconds=25)
    with started(config, 2, FAULT=pause) as launcher:
        wait_for_mark(mark, launcher)
        ranks = ranks_of(descendants(launcher.pid))
        os.kill(launcher.pid, signal.SIGKILL)
        with started(config, 2) as rerun:
            waiting = read_until(rerun, "waiting for process")
            assert f"process {ranks[0].pid} " in waiting
            assert ranks[0].is_running(), "the orphan holds the lock"
            output = finish(rerun)
            assert rerun.returncode == 0, output
        assert not [rank for rank in ranks.values() if rank.is_running()]
    check_finished_like(results, undisturbed(2, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("other_host", [False, True])
def test_the_lock_of_the_dead_is_taken_over(tmp_path: Path, other_host: bool) -> None:
    """At once on this host, where the process can be looked up; elsewhere when its heartbeat has stood still."""
    config, results = configured(tmp_path)
    mark = tmp_path / "killed"
    train(config, 0, expect=-signal.SIGKILL, FAULT=fault(fault_points.STEP_DONE, mark, number=25))
    assert mark.exists()
    owner_file = run_dir(results) / OWNER_FILE
    owner = json.loads(owner_file.read_text())
    if other_host:
        owner_file.write_text(json.dumps(owner | {"host": "elsewhere", "boot_id": "of another machine"}))

    with started(config, 0) as rerun:
        before = read_until(rerun, "waiting for process") if other_host else ""
        asked = time.monotonic()
        before += read_until(rerun, "run      ")
        taken = time.monotonic()
        output = before + finish(rerun)
        assert rerun.returncode == 0, output

    if other_host:
        assert f"process {owner['pid']} on host elsewhere" in before
        assert STALE_AFTER - 1 <= taken - asked <= STALE_AFTER + 5, f"taken over after {taken - asked:.1f} s"
    else:
        assert not lines(output, "lock"), "no wait for a process that is known to be dead"
    assert not owner_file.exists()
    check_finished_like(results, undisturbed(1, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("world", [2])
def test_a_corpus_whose_builder_is_killed_is_built_by_the_run_that_waits_for_it(tmp_path: Path, world: int) -> None:
    shared = tmp_path / "shared"
    one, two = (
        configured(tmp_path, {"name": name, "output_dir": str(shared)}, results=name)[0] for name in ("one", "two")
    )
    mark = tmp_path / "building"
    pause = fault(fault_points.CORPUS_BEGUN, mark, "pause", seconds=60)
    with started(one, world, FAULT=pause) as builder:
        wait_for_mark(mark, builder)
        torn = list((shared / SHARED_CORPORA).glob(".tmp-*"))
        assert len(torn) == 1
        with started(two, world) as waiter:
            read_until(waiter, "waiting for another process that builds")
            kill_tree(builder.pid)
            output = finish(waiter)
            assert waiter.returncode == 0, output
    assert not torn[0].exists(), "who builds next sweeps what the dead one left"
    train(one, world)

    expected = undisturbed(world, tmp_path)
    check_finished_like(shared / "two", expected, launches=1)
    check_finished_like(shared / "one", expected)
    corpora = [path for path in (shared / SHARED_CORPORA).iterdir() if path.is_dir()]
    assert len(corpora) == 1, corpora
