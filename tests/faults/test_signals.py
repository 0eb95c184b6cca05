"""Every stop signal, to everyone it may be sent to, in every phase: one checkpoint, nobody left, nothing lost."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from faults import (
    check_finished_like,
    check_intact,
    configured,
    fault,
    ranks_of,
    signalled,
    slow,
    start,
    start_ranks,
    undisturbed,
)
from faults import train as launch_and_wait
from harness import ROOT, kill_tree, record, run_dir, wait_for

from accel_train.checkpoints.manifest import list_checkpoints
from accel_train.process import fault_points
from accel_train.runs.listing import STATUS_CODES, run_status

TERM, USR1, USR2, INT = signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT
SIGNALS = (TERM, USR1, USR2, INT)
SECONDS_TO_LEAVE = 10
PAUSE = 1.0
# Where the signal arrives: the point at which the run is held, and the how-manieth time.
PHASES = {
    "training": (fault_points.STEP_DONE, 25),
    "evaluation": (fault_points.EVALUATION_BEGUN, 2),
    "saving": (fault_points.SAVE_HALF_WRITTEN, 9),
    "committing": (fault_points.COMMIT_SEALED, 9),
    "corpus building": (fault_points.CORPUS_BEGUN, 1),
}
LATER_PHASES = [phase for phase in PHASES if phase != "training"]

CASES = [
    # signal, times, target, phase, processes (0: no launcher)
    *[(number, 1, "one worker", "training", 0) for number in SIGNALS],
    *[(TERM, 1, target, "training", 1) for target in ("launcher", "group", "one worker")],
    *[(USR1, 1, target, "training", 1) for target in ("launcher", "group")],
    (INT, 1, "group", "training", 1),
    (USR2, 1, "one worker", "training", 1),
    *[
        (number, 1, target, "training", 2)
        for number in SIGNALS
        for target in ("launcher", "group", "all workers", "one worker")
    ],
    *[(number, 2, "launcher", "training", 2) for number in (TERM, INT)],
    *[(number, 2, "one worker", "training", 2) for number in (TERM, USR1)],
    *[(TERM, 2, "one worker", phase, 0) for phase in LATER_PHASES],
    *[
        (number, 1, target, phase, 2)
        for phase in LATER_PHASES
        for number, target in ((TERM, "launcher"), (USR1, "one worker"))
    ],
    *[(TERM, 2, "all workers", phase, 2) for phase in ("evaluation", "saving")],
    (INT, 1, "group", "evaluation", 2),
    (USR2, 1, "one worker", "training", 3),
]
QUICK = {
    (TERM, 2, "one worker", "corpus building", 0),
    (TERM, 2, "one worker", "committing", 0),
    (USR1, 1, "one worker", "evaluation", 2),
}


def send_signals(number: int, times: int, target: str):
    """To the launcher, its process group, all ranks, or the last rank only (rank 0 hears of it from there)."""

    def send(process: subprocess.Popen[str], workers: list[psutil.Process]) -> None:
        ranks = ranks_of(workers) or {0: workers[-1] if workers else psutil.Process(process.pid)}
        for turn in range(times):
            if turn:
                time.sleep(0.2)
            if target == "group":
                os.killpg(process.pid, number)
            pids = {
                "launcher": [process.pid],
                "group": [],
                "all workers": [each.pid for each in ranks.values()],
                "one worker": [ranks[max(ranks)].pid],
            }[target]
            for pid in pids:
                try:
                    os.kill(pid, number)
                except ProcessLookupError:
                    assert turn, "gone before the first signal"

    return send


@pytest.mark.parametrize(
    ("number", "times", "target", "phase", "world"),
    [
        pytest.param(*c, marks=() if c in QUICK else slow, id=f"{signal.Signals(c[0]).name}-{c[1:]}".replace("'", ""))
        for c in CASES
    ],
)
def test_a_signal_is_answered_with_one_checkpoint_and_the_rerun_finishes_with_the_same_bits(
    tmp_path: Path, number: int, times: int, target: str, phase: str, world: int
) -> None:
    expected = undisturbed(world, tmp_path)
    config, results = configured(tmp_path)
    point, passes = PHASES[phase]
    mark = tmp_path / "there"
    everywhere = None if phase == "training" else 0
    held = fault(point, mark, "pause", number=passes, rank=everywhere, seconds=PAUSE)

    process = start(config, world, FAULT=held)
    try:
        wait_for(lambda: mark.exists() or process.poll() is not None, phase)
        assert process.poll() is None, process.stdout.read()
        end = signalled(process, send_signals(number, times, target))
    finally:
        if process.poll() is None:
            kill_tree(process.pid)

    assert end.seconds < SECONDS_TO_LEAVE, end.output
    found = record(results)
    assert found["status"] == "preempted", end.output
    assert STATUS_CODES[run_status(run_dir(results))] == 75
    # A launcher answers with a code of its own.
    assert end.code == 75 if world == 0 else end.code != 0
    check_intact(results)
    saved = [step for step, _ in list_checkpoints(run_dir(results) / "checkpoints")]
    done = len(found["curves"]["train_loss"])
    if phase == "corpus building":
        assert (saved, done) == ([], 0)
    else:
        assert saved[-1] == done, "a step was lost"
        assert "run the same command again" in end.output

    if phase == "training" and number != TERM:
        return  # saved like any other; the way on from here does not know the signal
    launch_and_wait(config, world)
    check_finished_like(results, expected)
    assert [resume["step"] for resume in record(results)["provenance"]["resumes"]] == ([done] if saved else [])


@pytest.mark.parametrize("phase", ["evaluation", pytest.param("training", marks=slow)])
def test_a_second_interrupt_leaves_at_once(tmp_path: Path, phase: str) -> None:
    """More than a second after the first, in the middle of something long."""
    expected = undisturbed(0, tmp_path)
    config, results = configured(tmp_path)
    point, passes = PHASES[phase]
    mark = tmp_path / "there"
    process = start(config, 0, FAULT=fault(point, mark, "pause", number=passes, seconds=60))

    def send(process: subprocess.Popen[str], _workers: list[psutil.Process]) -> None:
        process.send_signal(INT)
        time.sleep(1.5)
        assert process.poll() is None, "left at the first interrupt, in the middle of a phase that does not end"
        process.send_signal(INT)

    wait_for(mark.exists, phase)
    end = signalled(process, send)
    assert end.code == 75, end.output
    assert end.seconds < 1.5 + 5
    assert "at once" in end.output
    check_intact(results)
    launch_and_wait(config, 0)
    check_finished_like(results, expected)


@pytest.mark.parametrize("number", [TERM, pytest.param(USR1, marks=slow), pytest.param(INT, marks=slow)])
def test_a_signal_before_the_run_has_begun_leaves_with_75_and_without_a_trace(tmp_path: Path, number: int) -> None:
    """While torch is being imported: a scheduler's script that requeues on 75 must requeue this too."""
    config, results = configured(tmp_path)
    process = start(config, 0)
    maps = Path(f"/proc/{process.pid}/maps")
    wait_for(lambda: "libtorch" in maps.read_text(), "the import of torch", timeout=20)
    assert not results.exists(), "too late: the run has begun"
    process.send_signal(number)
    output, _ = process.communicate(timeout=20)
    assert (process.returncode, output) == (75, "")
    assert not results.exists()


@pytest.mark.parametrize(
    ("there", "world", "number"), [((0, 1), 3, TERM), pytest.param((0,), 2, INT, marks=slow), ((1,), 2, USR1)]
)
def test_a_signal_to_ranks_that_wait_for_one_that_never_comes_is_answered(
    tmp_path: Path, there: tuple[int, ...], world: int, number: int
) -> None:
    """The wait is in a library's call that runs no Python code, and longer than this test has time."""
    config, results = configured(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as absent:
        address = absent.getsockname()
        if 0 in there:
            absent.close()
        processes = start_ranks(config, world, only=there, MASTER_PORT=str(address[1]))
        try:
            if 0 in there:
                wait_for(lambda: is_served(address), "rank 0 to wait for the others")
            else:
                absent.settimeout(60)
                _held, _ = absent.accept()  # and no word more
            time.sleep(3)  # rank 1 comes after rank 0
            asked_at = time.monotonic()
            for process in processes:
                process.send_signal(number)
            outputs = [process.communicate(timeout=30)[0] for process in processes]
            seconds = time.monotonic() - asked_at
        finally:
            for process in processes:
                if process.poll() is None:
                    kill_tree(process.pid)
    assert [process.returncode for process in processes] == [75] * len(there), outputs
    assert seconds < SECONDS_TO_LEAVE
    assert not any("Traceback" in output for output in outputs), outputs
    assert not results.exists()


def is_served(address: tuple[str, int]) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(address) == 0


@slow
@pytest.mark.parametrize("phase", ["training", "evaluation", "committing"])
def test_the_quick_run_on_two_processes_is_gone_within_ten_seconds(tmp_path: Path, phase: str) -> None:
    """The example as it is: its evaluation generates 1000 sequences twice, on the main process alone."""
    results, mark = tmp_path / "results", tmp_path / "there"
    point = {
        "training": fault_points.STEP_DONE,
        "evaluation": fault_points.EVALUATION_BEGUN,
        "committing": fault_points.COMMIT_BEGUN,
    }
    quick = ROOT / "examples" / "walks_quick.yaml"
    here = fault(point[phase], mark, "pause", seconds=0.1)
    process = start(quick, 2, "--output_dir", str(results), "--checkpoint.every_steps", "20", FAULT=here)
    wait_for(lambda: mark.exists() or process.poll() is not None, phase)
    end = signalled(process, send_signals(TERM, 1, "one worker"))
    assert end.seconds < SECONDS_TO_LEAVE, end.output
    found = record(results)
    assert found["status"] == "preempted", end.output
    assert list_checkpoints(run_dir(results) / "checkpoints")[-1][0] == len(found["curves"]["train_loss"])
