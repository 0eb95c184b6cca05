"""What the record of a run holds, and that it can be trusted."""

import json
import math
import os
import subprocess
import sys

import jsonschema
import numpy as np
import pytest

from accel_train import __version__
from accel_train.config.sections import ExperimentConfig, config_hash, experiment_id, to_dict
from accel_train.errors import RecordError
from accel_train.runs.lock import RunLock
from accel_train.runs.record import (
    METRICS_FILE,
    RECORD_FILE,
    STATUS_CODES,
    MetricsLog,
    cut_back_samples,
    git_state,
    list_runs,
    load_schema,
    load_sufficient_runs,
    new_record,
    read_record,
    run_status,
    strict_json,
    versions,
    write_record,
)

CONFIG = ExperimentConfig(description="a test", tags=("x", "y"))


def make_record(**changes):
    record = new_record(CONFIG, experiment_id=experiment_id(CONFIG), config_hash=config_hash(CONFIG), command=["train"])
    return record | changes


def passed_record():
    record = make_record(status="completed", finished_at="2026-01-02T00:00:00+00:00")
    criterion = {"metric": "edge_compliance", "op": ">", "threshold": 0.95, "value": 0.99, "passed": True}
    record["curves"] = {"train_loss": [2.0, 1.0], "edge_compliance": [0.99], "rule_compliance": [0.9]}
    record["gate"].update(passed=True, epoch=1, criteria=[criterion], evidence={"rule_checks": 500})
    record["metrics"]["scalars"].update(
        final_train_loss=1.0,
        final_edge_compliance=0.99,
        final_rule_compliance=0.9,
        gate_passed=True,
        epochs_trained=1,
    )
    return record


def validate(record):
    jsonschema.validate(record, load_schema(), cls=jsonschema.Draft202012Validator)


def store(results, name, record):
    (results / name).mkdir()
    write_record(results / name, record)
    return results / name


def violations(record):
    return [error.message for error in jsonschema.Draft202012Validator(load_schema()).iter_errors(record)]


# -- the schema ----------------------------------------------------------------------------


def test_schema_is_a_valid_schema():
    jsonschema.Draft202012Validator.check_schema(load_schema())


def test_new_record_and_passed_record_follow_the_schema():
    assert violations(make_record()) == []
    assert violations(passed_record()) == []


def test_record_read_back_follows_the_schema(tmp_path):
    write_record(tmp_path, passed_record())
    assert violations(read_record(tmp_path)) == []


@pytest.mark.parametrize("name", sorted(make_record()))
def test_schema_asks_for_every_field(name):
    record = make_record()
    del record[name]
    with pytest.raises(jsonschema.ValidationError, match=name):
        validate(record)


@pytest.mark.parametrize(
    ("section", "value"),
    [
        ("status", "done"),
        ("config_hash", "abc"),
        ("created_at", "yesterday"),
        ("curves", {"train_loss": [], "edge_compliance": [1.2], "rule_compliance": []}),
        ("curves", {"train_loss": ["nan"], "edge_compliance": [], "rule_compliance": []}),
        ("surprise", 1),
    ],
)
def test_schema_refuses_wrong_values(section, value):
    with pytest.raises(jsonschema.ValidationError):
        validate(make_record(**{section: value}))


def test_failed_record_must_give_its_reason():
    with pytest.raises(jsonschema.ValidationError):
        validate(make_record(status="failed"))
    validate(make_record(status="failed", reason="loss is not finite at step 3"))


def test_gate_passes_only_with_criteria_that_all_passed():
    record = passed_record()
    record["gate"]["criteria"][0]["passed"] = False
    with pytest.raises(jsonschema.ValidationError):
        validate(record)
    record["gate"]["criteria"] = []
    with pytest.raises(jsonschema.ValidationError):
        validate(record)


# -- result.json ---------------------------------------------------------------------------


def test_new_record_tells_what_is_run():
    record = make_record()

    assert record["config"] == to_dict(CONFIG)
    assert (record["description"], record["tags"], record["status"]) == ("a test", ["x", "y"], "running")
    assert record["provenance"]["command"] == ["train"]
    assert record["provenance"]["launches"] == 1
    assert record["run_id"] != make_record()["run_id"]


def test_next_launch_carries_identity_and_results_on():
    earlier = passed_record() | {"status": "failed", "reason": "disk full", "created_at": "2025-01-01T00:00:00+00:00"}
    earlier["provenance"] |= {"world_sizes": [2], "resumes": [{"step": 4}], "data_fingerprint": "ff", "git_commit": "0"}

    record = new_record(CONFIG, experiment_id="e", config_hash="0" * 64, command=["again"], earlier=earlier)

    for name in ("run_id", "created_at", "curves", "metrics", "gate", "timing"):
        assert record[name] == earlier[name]
    for name in ("world_sizes", "resumes", "data_fingerprint"):
        assert record["provenance"][name] == earlier["provenance"][name]
    assert (record["status"], record["reason"], record["finished_at"]) == ("running", None, None)
    assert record["provenance"]["launches"] == 2
    assert record["provenance"]["command"] == ["again"]
    assert record["provenance"]["git_commit"] != "0"


def test_record_survives_writing_and_reading(tmp_path):
    record = passed_record()
    write_record(tmp_path, record)
    assert read_record(tmp_path) == record
    assert [path.name for path in tmp_path.iterdir()] == [RECORD_FILE]


def test_failed_write_keeps_the_old_record(tmp_path, monkeypatch):
    write_record(tmp_path, make_record(reason="old"))

    def full_disk(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_record(tmp_path, make_record(reason="new"))

    assert read_record(tmp_path)["reason"] == "old"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float32("nan")])
def test_numbers_that_are_not_finite_become_null(tmp_path, value):
    record = make_record()
    record["curves"]["train_loss"] = [1.5, value]

    write_record(tmp_path, record)

    assert read_record(tmp_path)["curves"]["train_loss"] == [1.5, None]
    validate(read_record(tmp_path))


def test_numpy_numbers_are_numbers():
    assert json.loads(strict_json({"a": np.int64(3), "b": (np.float32(0.5), True, None)})) == {
        "a": 3,
        "b": [0.5, True, None],
    }


def test_value_that_is_not_json_is_refused_with_its_place(tmp_path):
    record = make_record()
    record["gate"]["evidence"] = {"rules": [1, object()]}
    with pytest.raises(TypeError, match=r"gate\.evidence\.rules\[1\]: object"):
        write_record(tmp_path, record)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "does not exist"),
        ("", "is damaged"),
        ('{"schema_version": 1, "sta', "is damaged"),
        ("[]", "is not a record"),
        ('{"schema_version": 1, "status": "odd"}', "is not a record"),
        ('{"schema_version": 2, "status": "completed"}', "schema version 2"),
    ],
)
def test_unusable_record_is_named_with_the_reason(tmp_path, content, said):
    if content is not None:
        (tmp_path / RECORD_FILE).write_text(content)
    with pytest.raises(RecordError, match=said) as caught:
        read_record(tmp_path)
    assert str(tmp_path / RECORD_FILE) in str(caught.value)


# -- metrics.jsonl -------------------------------------------------------------------------


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
        "import os, signal, sys; from pathlib import Path; from accel_train.runs.record import MetricsLog\n"
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


# -- all runs ------------------------------------------------------------------------------


def test_sufficient_runs_are_completed_and_passed(tmp_path):
    store(tmp_path, "good", passed_record())
    store(tmp_path, "missed", make_record(status="completed"))
    store(tmp_path, "unfinished", passed_record() | {"status": "preempted"})
    store(tmp_path, "broken", passed_record() | {"status": "failed", "reason": "x"})

    assert [record["experiment_id"] for record in load_sufficient_runs(str(tmp_path))] == [experiment_id(CONFIG)]
    assert load_sufficient_runs(tmp_path)[0] == read_record(tmp_path / "good")


def test_list_shows_every_run_oldest_first_and_nothing_else(tmp_path):
    store(tmp_path, "b-old", make_record(created_at="2025-01-01T00:00:00+00:00"))
    store(tmp_path, "a-new", passed_record())
    store(tmp_path, "a-new.archived-20250101T000000", passed_record())
    (tmp_path / "corpora" / "walks-1").mkdir(parents=True)
    (tmp_path / "README.md").write_text("")

    runs = list_runs(tmp_path)

    assert [run.id for run in runs] == ["b-old", "a-new"]
    assert (runs[1].status, runs[1].epochs, runs[1].gate_passed) == ("completed", 1, True)
    assert (runs[1].edge_compliance, runs[1].rule_compliance) == (0.99, 0.9)


def test_damaged_record_is_listed_as_such_and_left_out_of_the_sufficient_runs(tmp_path, caplog):
    store(tmp_path, "good", passed_record())
    (store(tmp_path, "torn", passed_record()) / RECORD_FILE).write_text("{")

    assert {run.id: run.status for run in list_runs(tmp_path)} == {"good": "completed", "torn": "damaged"}
    assert len(load_sufficient_runs(tmp_path)) == 1
    assert "torn" in caplog.text


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


# -- provenance ----------------------------------------------------------------------------


def git(root, *arguments):
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", "-C", root, *identity, *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path):
    git(tmp_path, "init", "--quiet")
    (tmp_path / "code.py").write_text("1")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "first")
    return tmp_path


def test_clean_checkout_is_known_by_its_commit(checkout):
    assert git_state(checkout) == (git(checkout, "rev-parse", "HEAD"), False)


def test_changed_checkout_is_dirty(checkout):
    (checkout / "code.py").write_text("2")
    assert git_state(checkout)[1] is True


def test_package_inside_another_checkout_has_no_commit(checkout):
    (checkout / "site-packages").mkdir()
    assert git_state(checkout / "site-packages") == (None, None)


def test_without_git_there_is_no_commit(tmp_path, monkeypatch):
    assert git_state(tmp_path) == (None, None)
    monkeypatch.setenv("PATH", "")
    assert git_state(tmp_path) == (None, None)


def test_versions_name_python_and_the_libraries():
    found = versions()
    assert found["accel_train"] == __version__
    assert {"python", "torch", "accelerate", "numpy"} <= found.keys()


def test_reading_records_imports_neither_torch_nor_numpy():
    script = "import sys, accel_train.runs.record; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
