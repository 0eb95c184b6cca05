"""``accel-train runs`` and ``accel-train checkpoints``: tables, JSON, and exit codes for scripts."""

import json
import subprocess
import sys

import pytest
from configs import experiment_config

from accel_train.checkpoints.manifest import step_directory, write_manifest
from accel_train.commands.main import main
from accel_train.files.sealed import DAMAGED
from accel_train.runs.lock import RunLock
from accel_train.runs.record import new_record, write_record
from accel_train.tasks.walks.task import WalksTask


@pytest.fixture
def results(tmp_path):
    """Three runs: one passed, one missed, one interrupted."""
    config = experiment_config()
    for name, status, passed in (
        ("good", "completed", True),
        ("missed", "completed", False),
        ("cut", "running", False),
    ):
        record = new_record(config, WalksTask)
        record.status = status
        record.gate.passed = passed
        if passed:
            figures = {"final_edge_compliance": 0.9876, "final_rule_compliance": 0.8765, "epochs_trained": 4}
            record.metrics.scalars |= figures
        (tmp_path / name).mkdir()
        write_record(tmp_path / name, record)
    return tmp_path


def test_runs_are_a_table_with_aligned_columns(results, capsys):
    assert main(["runs", str(results)]) == 0

    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["ID", "STATUS", "EPOCHS", "GATE", "EDGE", "RULE", "AGE"]
    rows = {line.split()[0]: line for line in lines[1:]}
    assert rows.keys() == {"good", "missed", "cut"}
    assert rows["good"].split()[1:6] == ["completed", "4", "passed", "0.988", "0.876"]
    assert rows["cut"].split()[1] == "interrupted"
    assert {row.index(row.split()[1]) for row in rows.values()} == {lines[0].index("STATUS")}


def test_only_passed_runs_are_listed_on_demand(results, capsys):
    assert main(["runs", str(results), "--passed", "--json"]) == 0
    assert [run["id"] for run in json.loads(capsys.readouterr().out)] == ["good"]


@pytest.mark.parametrize(("name", "status", "code"), [("good", "completed", 0), ("cut", "interrupted", 75)])
def test_status_is_printed_and_is_the_exit_code(results, capsys, name, status, code):
    assert main(["runs", str(results), "--status", name]) == code
    assert capsys.readouterr().out == f"{status}\n"


def test_status_of_a_live_run(results, capsys):
    lock = RunLock(results / "cut", timeout=0)
    lock.acquire()
    assert main(["runs", str(results), "--status", "cut", "--json"]) == 3
    lock.release()
    assert json.loads(capsys.readouterr().out) == {"id": "cut", "status": "live"}


@pytest.mark.parametrize("argv", [["runs", "/nowhere"], ["runs", "/tmp", "--status", "no-such-run"]])
def test_unknown_run_or_directory_is_one_line_and_exit_2(argv, capsys):
    assert main(argv) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("accel-train: error: /")
    assert shown.err.count("\n") == 1
    assert shown.out == ""


def test_runs_do_not_import_torch(results):
    script = (
        "import sys\nfrom accel_train.commands.main import main\n"
        f"main(['runs', {str(results)!r}])\nsys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, check=False).returncode == 0


# -- checkpoints ---------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    """A run with one sound checkpoint."""
    directory = tmp_path / "checkpoints" / step_directory(4)
    directory.mkdir(parents=True)
    (directory / "model.safetensors").write_bytes(b"weights")
    header = {"epoch": 1, "world_size": 2, "config_hash": "c" * 64, "rng": []}
    write_manifest(directory, {"step": 4, **header})
    return tmp_path


def damage(run):
    """Change a byte, not the size."""
    (run / "checkpoints" / step_directory(4) / "model.safetensors").write_bytes(b"WEIGHTS")


@pytest.mark.parametrize(("options", "state"), [([], "sizes agree"), (["--verify"], "sound")])
def test_checkpoints_are_a_table_that_says_how_it_looked(saved, capsys, options, state):
    assert main(["checkpoints", str(saved), *options]) == 0
    heading, row = capsys.readouterr().out.splitlines()
    assert heading.split() == ["CHECKPOINT", "STEP", "EPOCH", "PROCESSES", "SIZE", "AGE", "STATE"]
    assert row.split()[:6] == ["step_0000004", "4", "1", "2", "0.0", "MB"]
    assert row.endswith(state)


@pytest.mark.parametrize(("options", "code"), [([], 0), (["--verify"], 1)])
def test_a_changed_byte_is_found_by_reading_all(saved, capsys, options, code):
    damage(saved)
    assert main(["checkpoints", str(saved), *options, "--json"]) == code
    assert bool(json.loads(capsys.readouterr().out)[0]["problems"]) is bool(code)


def test_what_was_set_aside_is_told_and_no_failure(saved, capsys):
    damage(saved)
    directory = saved / "checkpoints" / step_directory(4)
    directory.rename(directory.with_name(f"{DAMAGED}{directory.name}-0a1b"))
    assert main(["checkpoints", str(saved), "--verify"]) == 0
    assert "set aside as damaged" in capsys.readouterr().out


def test_a_run_without_checkpoints_says_so(tmp_path, capsys):
    assert main(["checkpoints", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path} has no checkpoint yet\n"


def test_checkpoints_of_what_is_no_directory_are_refused(tmp_path, capsys):
    assert main(["checkpoints", str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err == (
        f"accel-train: error: RUN: '{tmp_path}/nowhere' is not a directory; name the directory of a run\n"
    )
