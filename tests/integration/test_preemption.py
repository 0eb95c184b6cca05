"""Signals to real runs: one checkpoint, the documented code, nobody left behind, the same bits in the end."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from harness import (
    TINY,
    checkpoints,
    descendants,
    kill_tree,
    launch,
    metrics,
    outcome,
    record,
    run_dir,
    wait_for,
    write_config,
)
from warm import fork

LONG = {"training": {"max_epochs": 400, "log_interval": 2}, "walks": {"num_walks": 244}}


def logged_steps(results: Path) -> int:
    try:
        return max((line["step"] for line in metrics(results)), default=0)
    except (AssertionError, FileNotFoundError, ValueError):
        return 0


def stop_when_training(config: Path, results: Path, world: int, send, *, after: int = 6):
    """Launch, wait until it trains, send the signal; returns code, output and seconds until all are gone."""
    process = launch(config, world)
    try:
        wait_for(lambda: logged_steps(results) >= after or process.poll() is not None, "the first steps")
        assert process.poll() is None, process.stdout.read()
        workers = descendants(process.pid)
        started = time.monotonic()
        send(process)
        output, _ = process.communicate(timeout=60)
        psutil.wait_procs(workers, timeout=20)
        seconds = time.monotonic() - started
        assert not [worker for worker in workers if worker.is_running()], "a worker was left behind"
    finally:
        if process.poll() is None:
            kill_tree(process.pid)
    return process.returncode, output, seconds


SHORT = {"training": {"max_epochs": 15, "log_interval": 2}}


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a run that nobody stops ends with."""
    directory = tmp_path_factory.mktemp("untouched")
    fork(write_config(directory / "c.yaml", TINY, SHORT, {"output_dir": str(directory / "results")}), 0)
    return outcome(directory / "results")


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_one_process_saves_and_leaves_with_75_and_ends_with_the_same_bits(
    tmp_path: Path, number: int, untouched: dict[str, Any]
) -> None:
    results = tmp_path / "results"
    config = write_config(tmp_path / "c.yaml", TINY, SHORT, {"output_dir": str(results)})
    code, output, seconds = stop_when_training(config, results, 0, lambda process: process.send_signal(number))
    assert code == 75, output
    assert "run the same command again" in output
    assert seconds < 10
    found = record(results)
    assert found["status"] == "preempted"
    step = len(found["curves"]["train_loss"])
    assert checkpoints(results)[-1].name == f"step_{step:07d}"
    fork(config, 0)
    assert record(results)["provenance"]["resumes"][0]["step"] == step
    assert outcome(results) == untouched


@pytest.mark.parametrize("target", ["launcher", pytest.param("one worker", marks=pytest.mark.slow)])
def test_two_processes_agree_to_stop_and_the_rerun_goes_on(tmp_path: Path, target: str) -> None:
    results = tmp_path / "results"
    config = write_config(tmp_path / "c.yaml", TINY, LONG, {"output_dir": str(results)})

    def send(process):
        if target == "launcher":
            process.send_signal(signal.SIGTERM)
        else:
            ranks = [p for p in descendants(process.pid) if p.environ().get("RANK") == "1"]
            assert len(ranks) == 1
            os.kill(ranks[0].pid, signal.SIGUSR1)

    _, output, seconds = stop_when_training(config, results, 2, send)
    assert record(results)["status"] == "preempted", output
    assert seconds < 10
    step = len(record(results)["curves"]["train_loss"])
    assert checkpoints(results)[-1].name == f"step_{step:07d}"
    logs = sorted(path.name for path in (run_dir(results) / "logs").iterdir())
    assert logs == ["rank_0.log", "rank_1.log"]

    _, output, _ = stop_when_training(
        config, results, 2, lambda process: process.send_signal(signal.SIGTERM), after=step + 4
    )
    after = record(results)
    assert after["status"] == "preempted", output
    assert [resume["step"] for resume in after["provenance"]["resumes"]] == [step]
    steps = [line["step"] for line in metrics(results) if "loss" in line]
    assert steps == sorted(set(steps))


def test_a_dead_launcher_leaves_no_orphan(tmp_path: Path) -> None:
    results = tmp_path / "results"
    config = write_config(tmp_path / "c.yaml", TINY, LONG, {"output_dir": str(results)})
    code, output, seconds = stop_when_training(config, results, 2, lambda process: process.kill())
    assert code == -signal.SIGKILL
    assert seconds < 10, output
    assert record(results)["status"] == "preempted"


def test_a_signal_to_the_whole_group_spares_the_data_loading_workers(tmp_path: Path) -> None:
    """A scheduler signals every process of the job; a worker that died of it would fail the run."""
    results = tmp_path / "results"
    workers = {"training": {"num_workers": 2}, "output_dir": str(results)}
    config = write_config(tmp_path / "c.yaml", TINY, LONG, workers)
    code, output, seconds = stop_when_training(
        config, results, 0, lambda process: os.killpg(process.pid, signal.SIGTERM)
    )
    assert code == 75, output
    assert seconds < 10
    assert record(results)["status"] == "preempted"
