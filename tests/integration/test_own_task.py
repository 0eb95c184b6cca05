"""A task of the user's own, by import path: the promises of the built-in tasks hold for it."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import ROOT, Shown, checkpoints, outcome, record, run, run_dir, write_config

from accel_train.commands.main import main
from accel_train.config.fields import from_dict
from accel_train.process.work import SILENT
from accel_train.tasks.registry import build_task, config_class

OWN = ROOT / "examples" / "own_task"
IMPORTABLE = {"PYTHONPATH": os.pathsep.join(map(str, (OWN, ROOT, Path(__file__).parent)))}
SMALL: dict[str, Any] = {
    "task": "sorting:Sorting",
    "name": "mine",
    "sorting": {
        "length": 3,
        "digits": 8,
        "num_train": 450,
        "num_held_out": 60,
        "gate": {"accuracy_threshold": 0.9, "stop_on_pass": False},
    },
    "model": {"d_model": 32, "n_layers": 1, "n_heads": 2, "max_seq_len": 6, "dropout": 0.02},
    "training": {"batch_size": 15, "learning_rate": 0.005, "max_epochs": 10, "log_interval": 5},
    "checkpoint": {"every_steps": 20, "keep_last": 2},
    "hooks": {"update": ["killing:at_step"]},
}
"""30 steps an epoch, 300 in all; never stopped by its gate."""
NOT_WHOLE = """
from accel_train.tasks.base import Task

class Section:
    size: int

class Bare(Task):
    name = "bare"
    Config = Section

class Whole(Bare):
    vocab_size = 5
    def build(self, shared, work): ...
    def open(self, artifacts): ...
    def evaluate(self, model, losses, work): ...

class Numbered(Whole):
    name = 3
"""

Here = Callable[..., Shown]


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(OWN))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The configuration and the results of an undisturbed run."""
    directory = tmp_path_factory.mktemp("own")
    config = write_config(directory / "c.yaml", SMALL, {"output_dir": str(directory / "out")})
    run(config, 0, **IMPORTABLE)
    return config, directory / "out"


def test_help_shows_the_section_of_the_task(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["train", "--task", "sorting:Sorting", "--help"])
    shown = capsys.readouterr().out
    assert "--sorting.length N" in shown
    assert "Digits in a list. (default: 6)" in " ".join(shown.split())
    assert "--walks" not in shown


@pytest.mark.parametrize(
    ("option", "value", "line"),
    [
        ("length", "1", "sorting.length: 1 must lie in [2, 18]"),
        ("lenght", "3", "did you mean sorting.length?"),
        ("length", "9", "sorting.length: 9 needs model.max_seq_len >= 18, not 6"),
        ("digits", "7", "sorting.num_train: 450 and 60 held out are more than the 343 different lists"),
        ("gate.accuracy_threshold", "1", "sorting.gate.accuracy_threshold: 1 must lie in [0, 1)"),
    ],
)
def test_a_wrong_value_of_the_section_is_one_line(
    here: Here, tmp_path: Path, option: str, value: str, line: str
) -> None:
    config = write_config(tmp_path / "c.yaml", SMALL, {"output_dir": str(tmp_path / "out")})
    shown = here("train", "--config", config, f"--sorting.{option}", value)
    assert shown.code == 2
    assert line in shown.err
    assert shown.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("task", "line"),
    [
        ("not_whole:Bare", "has no build, no evaluate, no open, no vocab_size; see accel_train.tasks.base.Task"),
        ("not_whole:Numbered", "has no name; see"),
        ("not_whole:Whole", "task: 'bare.size' is a field without a default"),
        (":Whole", "names no module; write package.module:name"),
        (".not_whole:Whole", "names no module; write package.module:name"),
    ],
)
def test_a_task_that_is_not_whole_is_one_line(
    here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str, line: str
) -> None:
    (tmp_path / "not_whole.py").write_text(NOT_WHOLE)
    monkeypatch.syspath_prepend(str(tmp_path))
    shown = here("train", "--task", task)
    assert shown.code == 2
    assert line in shown.err
    assert shown.err.count("\n") == 1


def test_an_error_inside_the_module_is_told_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not as a name that the module lacks: what is wrong is the line in it."""
    (tmp_path / "mistaken.py").write_text("import os\nos.no_such_thing\nclass Own: ...\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(AttributeError, match="no_such_thing"):
        main(["train", "--task", "mistaken:Own"])


def test_no_list_is_drawn_twice(tmp_path: Path) -> None:
    """What the gate asks for is never trained on."""
    config = from_dict({k: SMALL[k] for k in ("task", "sorting", "model")}, config_class("sorting:Sorting"))
    artifacts = Path(build_task(config).build(tmp_path, SILENT))
    train, held_out = (np.load(artifacts / f"{name}.npy") for name in ("train", "held_out"))
    assert (len(train), len(held_out)) == (450, 60)
    assert len({*map(tuple, train.tolist()), *map(tuple, held_out.tolist())}) == 510


def test_a_killed_run_ends_with_the_same_bits(finished: tuple[Path, Path], tmp_path: Path) -> None:
    """Killed in mid-epoch, with dropout; the same command goes on from the last checkpoint."""
    config, mark = write_config(tmp_path / "c.yaml", SMALL, {"output_dir": str(tmp_path / "out")}), tmp_path / "killed"
    run(config, 0, expect=-signal.SIGKILL, KILL_AT_STEP="170", KILL_MARK=str(mark), **IMPORTABLE)
    assert mark.exists()
    assert record(tmp_path / "out")["status"] == "running"
    assert checkpoints(tmp_path / "out")

    shown = run(config, 0, **IMPORTABLE)

    assert "resumed after step" in shown
    found, expected = record(tmp_path / "out"), record(finished[1])
    # A checkpoint every 20 steps and at the end of every epoch of 30; the newest may still have been in flight.
    assert next(resume["step"] for resume in found["provenance"]["resumes"]) in {150, 160}
    assert outcome(tmp_path / "out") == outcome(finished[1])
    for part in ("status", "gate", "metrics"):
        assert found[part] == expected[part], part


def test_the_gate_the_record_and_the_figure_know_the_task(finished: tuple[Path, Path]) -> None:
    found = record(finished[1])
    assert found["gate"]["passed"], found["gate"]["failure_reason"]
    assert found["gate"]["evidence"]["lists"] == 60
    assert found["metrics"]["scalars"]["final_accuracy"] > 0.9
    assert len(found["curves"]["accuracy"]) == 10
    assert (run_dir(finished[1]) / "figures" / "training_curves.png").stat().st_size > 10_000


def test_the_table_of_runs_has_the_columns_of_the_task(here: Here, finished: tuple[Path, Path]) -> None:
    heading, row = here("runs", finished[1]).out.splitlines()
    accuracy = record(finished[1])["metrics"]["scalars"]["final_accuracy"]
    assert heading.split() == ["ID", "STATUS", "EPOCHS", "GATE", "SORTED", "AGE"]
    assert row.split()[:5] == ["mine", "completed", "10", "passed", f"{accuracy:.3f}"]


def test_evaluate_agrees_with_the_record(here: Here, finished: tuple[Path, Path]) -> None:
    verdict, gate = json.loads(here("evaluate", run_dir(finished[1])).out), record(finished[1])["gate"]
    assert {name: verdict[name] for name in ("passed", "criteria", "evidence")} == {
        name: gate[name] for name in ("passed", "criteria", "evidence")
    }


def test_generate_writes_what_the_task_says(here: Here, finished: tuple[Path, Path]) -> None:
    lines = here("generate", run_dir(finished[1]), "--num", 3).out.splitlines()
    assert len(lines) == 3
    assert all(" -> [" in line for line in lines)


def test_a_run_whose_task_is_not_importable_says_so(here: Here, finished: tuple[Path, Path], tmp_path: Path) -> None:
    """As after a change of directory; the run itself is sound."""
    stored = (run_dir(finished[1]) / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(stored.replace("sorting:Sorting", "not_here:Sorting"))
    shown = here("evaluate", tmp_path)
    assert shown.code == 2
    assert "task: 'not_here:Sorting' cannot be imported" in shown.err
    assert "on PYTHONPATH?" in shown.err
    assert "version" not in shown.err


def test_a_named_run_refuses_another_section(here: Here, finished: tuple[Path, Path]) -> None:
    config, results = finished
    before = (run_dir(results) / "result.json").read_bytes()
    shown = here("train", "--config", config, "--sorting.num_train", 451)
    assert shown.code == 2
    assert "sorting.num_train: 451 here, 450 there" in shown.err
    assert (run_dir(results) / "result.json").read_bytes() == before
