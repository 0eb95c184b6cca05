"""The log of a run survives kills, and is cut back to a step."""

import math
import subprocess
import sys

import pytest

from accel_train.runs.metrics_log import METRICS_FILE, MetricsLog, cut_back_samples


@pytest.fixture
def metrics(tmp_path):
    log = MetricsLog(tmp_path / METRICS_FILE)
    for step in (10, 20, 30):
        log.append({"run_id": "r", "config_hash": "c", "git_commit": None, "step": step, "loss": 1 / step})
    return log


def test_lines_are_read_as_they_were_appended(metrics):
    assert [line["step"] for line in metrics.read()] == [10, 20, 30]
    assert metrics.read()[0]["loss"] == 0.1


def test_appended_line_outlives_a_killed_process(tmp_path):
    script = (
        "import os, signal, sys; from pathlib import Path; from accel_train.runs.metrics_log import MetricsLog\n"
        "MetricsLog(Path(sys.argv[1])).append({'step': 1}); os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path / METRICS_FILE)], check=False)

    assert killed.returncode == -9
    assert MetricsLog(tmp_path / METRICS_FILE).read() == [{"step": 1}]


def test_line_without_a_step_is_refused(metrics):
    with pytest.raises(KeyError, match="step"):
        metrics.append({"loss": 1.0})


def test_loss_that_is_not_finite_is_null(metrics):
    metrics.append({"step": 40, "loss": math.nan})
    assert metrics.read()[-1] == {"step": 40, "loss": None}


@pytest.mark.parametrize(("step", "kept"), [(0, []), (15, [10]), (20, [10, 20]), (99, [10, 20, 30])])
def test_cutting_back_keeps_the_lines_up_to_the_step(metrics, step, kept):
    assert metrics.cut_back(step) == 30, "the last step that the log told of"
    assert [line["step"] for line in metrics.read()] == kept


@pytest.mark.parametrize("torn", ['{"step": 15, "lo', '{"step": 15}', "\x00\x00\x00"])
def test_torn_last_line_is_not_read_and_is_cut_off(metrics, torn):
    with metrics.path.open("a") as file:
        file.write(torn)
    assert [line["step"] for line in metrics.read()] == [10, 20, 30]

    metrics.cut_back(30)
    metrics.append({"step": 40})

    assert [line["step"] for line in metrics.read()] == [10, 20, 30, 40]


def test_log_that_does_not_exist_is_empty(tmp_path):
    log = MetricsLog(tmp_path / METRICS_FILE)
    assert log.cut_back(5) == 0
    assert log.read() == []
    assert not log.path.exists()


def test_samples_of_steps_that_were_rolled_back_are_removed(tmp_path):
    for name in ("step_0000010.txt", "step_0000020.txt", "step_0000021.txt", "step_30", "notes.txt", "step_x"):
        (tmp_path / name).write_text("") if name != "step_30" else (tmp_path / name).mkdir()
    cut_back_samples(tmp_path, 20)
    assert {path.name for path in tmp_path.iterdir()} == {"step_0000010.txt", "step_0000020.txt", "notes.txt", "step_x"}
    cut_back_samples(tmp_path / "missing", 20)
