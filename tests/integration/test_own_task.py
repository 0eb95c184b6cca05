"""A task of the user's own, by import path: the promises of the built-in tasks hold for it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from harness import ROOT, environment, outcome, record, run_dir, wait_for, write_config

OWN = ROOT / "examples" / "own_task"
SMALL: dict[str, Any] = {
    "task": "sorting:Sorting",
    "sorting": {"length": 3, "digits": 5, "num_train": 1200, "num_held_out": 60, "gate": {"stop_on_pass": False}},
    "model": {"d_model": 16, "n_layers": 1, "n_heads": 2, "max_seq_len": 6, "dropout": 0.1},
    "training": {"batch_size": 12, "learning_rate": 0.01, "max_epochs": 4, "log_interval": 5},
    "checkpoint": {"every_steps": 20, "keep_last": 2},
}


def start(*arguments: object) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", "accel_train.commands.main", *map(str, arguments)]
    path = f"{OWN}:{ROOT}"
    return subprocess.Popen(
        line, env=environment(PYTHONPATH=path), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def call(*arguments: object, expect: int = 0) -> str:
    process = start(*arguments)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == expect, output
    return output


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The configuration and the results of an undisturbed run."""
    directory = tmp_path_factory.mktemp("own")
    config = write_config(directory / "c.yaml", SMALL, {"output_dir": str(directory / "out")})
    call("train", "--config", config)
    return config, directory / "out"


def test_help_shows_the_section_of_the_task() -> None:
    shown = call("train", "--task", "sorting:Sorting", "--help")
    assert "--sorting.length N" in shown
    assert "Digits in a list. (default: 6)" in " ".join(shown.split())
    assert "--walks" not in shown


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--sorting.length", "1"], "sorting.length: 1 must lie in [2, 64]"),
        (["--sorting.lenght", "3"], "did you mean sorting.length?"),
        (["--sorting.length", "9"], "sorting.length: 9 needs model.max_seq_len >= 18, not 6"),
        (["--sorting.gate.accuracy_threshold", "2"], "sorting.gate.accuracy_threshold: 2 must lie in [0, 1]"),
    ],
)
def test_a_wrong_value_of_the_section_is_one_line(tmp_path: Path, options: list[str], line: str) -> None:
    config = write_config(tmp_path / "c.yaml", SMALL, {"output_dir": str(tmp_path / "out")})
    shown = call("train", "--config", config, *options, expect=2)
    assert line in shown
    assert shown.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_killed_run_ends_with_the_same_bits(finished: tuple[Path, Path], tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.yaml", SMALL, {"output_dir": str(tmp_path / "out")})
    process = start("train", "--config", config)
    wait_for(lambda: list(tmp_path.glob("out/*/checkpoints/step_0000140")), "the checkpoint of step 140")
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=60) == -signal.SIGKILL
    assert record(tmp_path / "out")["status"] == "running", "killed in the middle"
    assert record(tmp_path / "out")["metrics"]["scalars"]["epochs_trained"] < 4

    shown = call("train", "--config", config)

    assert "resumed after step" in shown
    assert outcome(tmp_path / "out") == outcome(finished[1])
    assert record(tmp_path / "out")["provenance"]["resumes"][0]["step"] >= 140


def test_the_gate_the_record_and_the_table_know_the_task(finished: tuple[Path, Path]) -> None:
    _, results = finished
    found = record(results)
    assert found["gate"]["passed"], found["gate"]["failure_reason"]
    assert found["gate"]["evidence"]["lists"] == 60
    assert found["metrics"]["scalars"]["final_accuracy"] > 0.95
    assert len(found["curves"]["accuracy"]) == 4
    assert (run_dir(results) / "figures" / "training_curves.png").stat().st_size > 10_000
    heading, row = call("runs", results).splitlines()
    assert heading.split() == ["ID", "STATUS", "EPOCHS", "GATE", "SORTED", "AGE"]
    assert row.split()[1:4] == ["completed", "4", "passed"]


def test_evaluate_agrees_with_the_record(finished: tuple[Path, Path]) -> None:
    _, results = finished
    verdict = json.loads(call("evaluate", run_dir(results)))
    assert verdict["criteria"] == record(results)["gate"]["criteria"]


def test_generate_writes_what_the_task_says(finished: tuple[Path, Path]) -> None:
    lines = call("generate", run_dir(finished[1]), "--num", 3).splitlines()
    assert len(lines) == 3
    assert all(" -> [" in line for line in lines)


def test_a_named_run_refuses_another_section(finished: tuple[Path, Path], tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.yaml", SMALL, {"output_dir": str(tmp_path / "out"), "name": "mine"})
    call("train", "--config", config, "--training.max_steps", "2")
    shown = call("train", "--config", config, "--training.max_steps", "2", "--sorting.num_train", "1300", expect=2)
    assert "sorting.num_train: 1300 here, 1200 there" in shown
