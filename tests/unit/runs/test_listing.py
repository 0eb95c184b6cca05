"""All runs of a results directory, and how each stands."""

import json
import subprocess
import sys

import pytest
from records import CONFIG, make_record, passed_record

from accel_train.config.identity import experiment_id
from accel_train.errors import RecordError
from accel_train.runs.listing import STATUS_CODES, list_runs, load_sufficient_runs, run_status
from accel_train.runs.lock import RunLock
from accel_train.runs.record import RECORD_FILE, read_record, write_record


def store(results, name, record):
    (results / name).mkdir()
    write_record(results / name, record)
    return results / name


def test_sufficient_runs_are_completed_and_passed(tmp_path):
    store(tmp_path, "good", passed_record())
    store(tmp_path, "missed", make_record(status="completed"))
    store(tmp_path, "unfinished", passed_record().model_copy(update={"status": "preempted"}))
    store(tmp_path, "broken", passed_record().model_copy(update={"status": "failed", "reason": "x"}))

    assert [record["experiment_id"] for record in load_sufficient_runs(str(tmp_path))] == [experiment_id(CONFIG)]
    assert load_sufficient_runs(tmp_path)[0] == read_record(tmp_path / "good").to_dict()


def test_list_shows_every_run_oldest_first_and_nothing_else(tmp_path):
    store(tmp_path, "b-old", make_record(created_at="2025-01-01T00:00:00+00:00"))
    store(tmp_path, "a-new", passed_record())
    store(tmp_path, "a-new.archived-20250101T000000", passed_record())
    (tmp_path / "corpora" / "walks-1").mkdir(parents=True)
    (tmp_path / "README.md").write_text("")

    runs = list_runs(tmp_path)

    assert [run.id for run in runs] == ["b-old", "a-new"]
    assert (runs[1].status, runs[1].epochs, runs[1].gate_passed) == ("completed", 1, True)
    assert runs[1].figures == {"edge_compliance": 0.99, "rule_compliance": 0.9}
    assert runs[1].to_dict()["edge_compliance"] == 0.99


def test_damaged_record_is_listed_as_such_and_left_out_of_the_sufficient_runs(tmp_path, caplog):
    store(tmp_path, "good", passed_record())
    (store(tmp_path, "torn", passed_record()) / RECORD_FILE).write_text("{")

    assert {run.id: run.status for run in list_runs(tmp_path)} == {"good": "completed", "torn": "damaged"}
    assert len(load_sufficient_runs(tmp_path)) == 1
    assert "torn" in caplog.text


def test_a_passed_run_with_a_wrong_field_is_left_out(tmp_path, caplog):
    store(tmp_path, "good", passed_record())
    values = passed_record().to_dict() | {"provenance": {}}
    (store(tmp_path, "torn", passed_record()) / RECORD_FILE).write_text(json.dumps(values))

    assert load_sufficient_runs(tmp_path) == [read_record(tmp_path / "good").to_dict()]
    assert "torn" in caplog.text
    assert "provenance.git_commit" in caplog.text


def test_results_directory_must_exist(tmp_path):
    with pytest.raises(RecordError, match="not a directory"):
        list_runs(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("stored", "locked", "status", "code"),
    [
        ("completed", False, "completed", 0),
        ("completed", True, "completed", 0),
        ("failed", False, "failed", 1),
        ("failed", True, "live", 3),
        ("preempted", False, "preempted", 75),
        ("preempted", True, "live", 3),
        ("running", False, "interrupted", 75),
        ("running", True, "live", 3),
    ],
)
def test_status_is_the_record_corrected_by_the_lock(tmp_path, stored, locked, status, code):
    run_dir = store(tmp_path, "run", make_record(status=stored))
    lock = RunLock(run_dir, timeout=0)
    if locked:
        lock.acquire()

    assert run_status(run_dir) == status
    assert STATUS_CODES[status] == code
    assert list_runs(tmp_path)[0].status == status
    lock.release()


def test_run_killed_before_its_first_record_is_interrupted(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("seed: 1\n")
    assert run_status(tmp_path / "run") == "interrupted"


def test_status_of_no_run_is_an_error(tmp_path):
    with pytest.raises(RecordError, match="not the directory of a run"):
        run_status(tmp_path)


def test_listing_imports_neither_torch_nor_numpy():
    script = "import sys, accel_train.runs.listing; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
