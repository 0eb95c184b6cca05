"""Two machines train together, their link is cut, both end; with the link back the same commands go on."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from harness import (
    ACCELERATE,
    TINY,
    checkpoints,
    descendants,
    environment,
    kill_tree,
    metrics,
    outcome,
    record,
    wait_for,
    write_config,
)
from netns import ADDRESSES, INTERFACE, Cut, TwoMachines, two_machines, unavailable

_reason = unavailable()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(_reason is not None, reason=_reason or "")]

TIMEOUT = 10.0
MARGIN = 8.0
"""For the launchers, which look after their workers at intervals and then report."""
STEPS = 240
LAST_WORDS = "accel-train: error: "
SCRIPT = Path(__file__).parent / "held_evaluation.py"


@pytest.fixture(scope="module")
def machines() -> Iterator[TwoMachines]:
    with two_machines() as joined:
        assert not joined.is_cut()
        yield joined


@pytest.fixture(scope="module")
def undisturbed(machines: TwoMachines, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the run leaves when nothing happens to it."""
    directory = tmp_path_factory.mktemp("undisturbed")
    finish(Launch(machines, configure(directory), directory))
    return outcome(directory / "results")


def configure(directory: Path) -> Path:
    """240 steps on two machines, evaluated in the middle and at the end."""
    training = {"max_epochs": 12, "eval_interval": 120, "timeout_seconds": TIMEOUT}
    layers = {"output_dir": str(directory / "results"), "training": training, "checkpoint": {"every_steps": 10}}
    return write_config(directory / "config.yaml", TINY, layers)


class Launch:
    """``accelerate launch`` on both machines; as a context manager it leaves no process behind."""

    def __init__(self, machines: TwoMachines, config: Path, directory: Path, **env: str) -> None:
        self._outputs = [directory / f"machine{machine}.out" for machine in (0, 1)]
        self.launchers = [
            subprocess.Popen(
                machines.inside(machine, _command(machine, config)),
                env=environment(GLOO_SOCKET_IFNAME=INTERFACE, **env),
                stdout=output.open("w"),
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            for machine, output in enumerate(self._outputs)
        ]

    def __enter__(self) -> Launch:
        return self

    def __exit__(self, *_: object) -> None:
        for launcher in self.launchers:
            if launcher.poll() is None:
                kill_tree(launcher.pid)

    def outputs(self) -> list[str]:
        return [output.read_text() for output in self._outputs]

    def last_words(self) -> list[str]:
        """What each machine's screen says of the failure: one line of ours."""
        lines = [[line for line in text.splitlines() if line.startswith(LAST_WORDS)] for text in self.outputs()]
        assert [len(found) for found in lines] == [1, 1], self.outputs()
        return [found[0].removeprefix(LAST_WORDS) for found in lines]


def _command(machine: int, config: Path) -> list[str]:
    size = ["--num_machines", "2", "--num_processes", "2", "--machine_rank", str(machine)]
    meeting_point = ["--main_process_ip", ADDRESSES[0], "--main_process_port", "29500"]
    return [*ACCELERATE, "--multi_gpu", *size, *meeting_point, str(SCRIPT), "--config", str(config)]


def finish(launch: Launch) -> None:
    with launch:
        for launcher in launch.launchers:
            launcher.wait(timeout=90)
    assert [launcher.returncode for launcher in launch.launchers] == [0, 0], launch.outputs()


@dataclass(frozen=True)
class Ending:
    """How a launch ended after the cut."""

    codes: list[int]
    seconds: list[float]


def cut_and_watch(launch: Launch, machines: TwoMachines, how: Cut) -> Ending:
    """Cut the link and wait until launchers and workers are gone."""
    workers = [worker for launcher in launch.launchers for worker in descendants(launcher.pid)]
    assert workers
    machines.cut(how)
    began = time.monotonic()
    assert machines.is_cut()
    seconds = []
    for launcher in launch.launchers:
        launcher.wait(timeout=60)
        seconds.append(time.monotonic() - began)
    _, alive = psutil.wait_procs(workers, timeout=1)
    assert not alive
    return Ending([launcher.returncode for launcher in launch.launchers], seconds)


@pytest.fixture
def mended(machines: TwoMachines) -> Iterator[TwoMachines]:
    """The machines, joined again whatever a test does."""
    yield machines
    machines.mend()


def wait_for_training(results: Path) -> None:
    wait_for(lambda: list(results.glob("*/metrics.jsonl")) and len(metrics(results)) >= 4, "training to go on")


def test_an_outage_shorter_than_the_timeout_is_sat_out(
    mended: TwoMachines, undisturbed: dict[str, Any], tmp_path: Path
):
    config, results = configure(tmp_path), tmp_path / "results"
    with Launch(mended, config, tmp_path) as launch:
        wait_for_training(results)
        mended.cut("silent")
        assert mended.is_cut()  # takes a second
        before = len(metrics(results))
        time.sleep(1)
        assert len(metrics(results)) == before, "training went on over a link that was cut"
        mended.mend()
        finish(launch)
    assert before < STEPS / TINY["training"]["log_interval"]
    assert record(results)["provenance"]["launches"] == 1
    assert outcome(results) == undisturbed


@pytest.mark.parametrize("how", ["unplugged", "silent"])
def test_a_link_cut_in_training_ends_both_machines_and_the_same_commands_go_on(
    how: Cut, mended: TwoMachines, undisturbed: dict[str, Any], tmp_path: Path
):
    config, results = configure(tmp_path), tmp_path / "results"
    with Launch(mended, config, tmp_path) as launch:
        wait_for_training(results)
        ending = cut_and_watch(launch, mended, how)
    assert 16 <= metrics(results)[-1]["step"] < STEPS // 2, "it was not training when the link was cut"
    assert ending.codes == [1, 1]
    assert max(ending.seconds) < TIMEOUT + MARGIN
    for lost, words in zip((1, 0), launch.last_words(), strict=True):
        assert words.startswith(f"rank {lost} does not answer any more: another rank is gone")
    assert record(results)["status"] == "running"
    assert checkpoints(results)

    mended.mend()
    assert not mended.is_cut()
    finish(Launch(mended, config, tmp_path))
    assert len(record(results)["provenance"]["resumes"]) == 1
    assert outcome(results) == undisturbed


def test_a_link_that_loses_all_packets_in_an_evaluation_ends_both_machines_and_the_same_commands_go_on(
    mended: TwoMachines, undisturbed: dict[str, Any], tmp_path: Path
):
    config, results, mark = configure(tmp_path), tmp_path / "results", tmp_path / "evaluating"
    with Launch(mended, config, tmp_path, HOLD_MARK=str(mark)) as launch:
        wait_for(mark.exists, "the evaluation")
        ending = cut_and_watch(launch, mended, "silent")
    assert metrics(results)[-1]["step"] == STEPS // 2
    assert "gate_passed" not in metrics(results)[-1], "the evaluation was over when the link was cut"
    assert ending.codes == [1, 1]
    assert max(ending.seconds) < TIMEOUT + MARGIN
    assert launch.last_words() == [
        f"rank 1 has been silent for {TIMEOUT:g} s in 'evaluation'",
        f"rank 0 has not answered for {TIMEOUT:g} s (waiting for 'evaluation'): it or the link to its machine is down",
    ]
    assert record(results)["status"] == "running"

    mended.mend()
    assert not mended.is_cut()
    finish(Launch(mended, config, tmp_path))
    assert len(record(results)["provenance"]["resumes"]) == 1
    assert outcome(results) == undisturbed
