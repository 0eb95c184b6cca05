"""What the record of a run holds, and that it can be trusted."""

import json
import math
import os

import jsonschema
import numpy as np
import pytest
from records import CONFIG, make_record, passed_record

from accel_train.config.fields import to_dict
from accel_train.errors import RecordError
from accel_train.runs.record import RECORD_FILE, new_record, read_record, record_schema, strict_json, write_record
from accel_train.tasks.walks.task import WalksTask


def validate(record):
    jsonschema.validate(record, record_schema(), cls=jsonschema.Draft202012Validator)


def violations(record):
    return [error.message for error in jsonschema.Draft202012Validator(record_schema()).iter_errors(record)]


# -- the schema ----------------------------------------------------------------------------


def test_schema_is_a_valid_schema():
    jsonschema.Draft202012Validator.check_schema(record_schema())


def test_new_record_and_passed_record_follow_the_schema():
    assert violations(make_record().to_dict()) == []
    assert violations(passed_record().to_dict()) == []


def test_record_read_back_follows_the_schema(tmp_path):
    write_record(tmp_path, passed_record())
    assert violations(read_record(tmp_path).to_dict()) == []


@pytest.mark.parametrize("name", sorted(make_record().to_dict()))
def test_schema_asks_for_every_field(name):
    record = make_record().to_dict()
    del record[name]
    with pytest.raises(jsonschema.ValidationError, match=name):
        validate(record)


@pytest.mark.parametrize(
    ("section", "value"),
    [
        ("status", "done"),
        ("config_hash", "abc"),
        ("created_at", "yesterday"),
        ("curves", {"train_loss": ["nan"], "edge_compliance": [], "rule_compliance": []}),
        ("surprise", 1),
    ],
)
def test_schema_refuses_wrong_values(section, value):
    with pytest.raises(jsonschema.ValidationError):
        validate(make_record().to_dict() | {section: value})


def test_failed_record_must_give_its_reason():
    with pytest.raises(jsonschema.ValidationError):
        validate(make_record(status="failed").to_dict())
    validate(make_record(status="failed", reason="loss is not finite at step 3").to_dict())


def test_gate_passes_only_with_criteria_that_all_passed():
    record = passed_record().to_dict()
    record["gate"]["criteria"][0]["passed"] = False
    with pytest.raises(jsonschema.ValidationError):
        validate(record)
    record["gate"]["criteria"] = []
    with pytest.raises(jsonschema.ValidationError):
        validate(record)


@pytest.mark.parametrize(
    "path",
    [
        ("run_id",),
        ("config_hash",),
        ("provenance", "git_commit"),
        ("provenance", "hook_list"),
        ("provenance", "data_fingerprint"),
        ("gate", "failure_reason"),
        ("gate", "passed"),
        ("curves", "train_loss"),
        ("metrics", "scalars"),
    ],
    ids=".".join,
)
def test_the_fields_of_the_contract_are_in_every_record(path):
    """What requirements D9, D11 and C10 name, under the names that readers of records rely on."""
    value = make_record().to_dict()
    for name in path:
        assert name in value
        value = value[name]


@pytest.mark.parametrize("section", ["gate", "provenance", "metrics", "timing"])
def test_schema_asks_for_every_field_of_a_section(section):
    for name in make_record().to_dict()[section]:
        record = make_record().to_dict()
        del record[section][name]
        assert any(name in message for message in violations(record)), name


def test_schema_names_a_failed_criterion_of_a_passed_gate():
    record = passed_record().to_dict()
    record["gate"]["criteria"].append({**record["gate"]["criteria"][0], "passed": False})
    [error] = jsonschema.Draft202012Validator(record_schema()).iter_errors(record)
    assert list(error.absolute_path) == ["gate", "criteria", 1, "passed"]


@pytest.mark.parametrize("change", [{"failure_reason": "too slow"}, {"epoch": None}])
def test_passed_gate_has_an_epoch_and_no_failure(change):
    record = passed_record().to_dict()
    record["gate"] |= change
    assert violations(record)


# -- result.json ---------------------------------------------------------------------------


def test_new_record_tells_what_is_run():
    record = make_record()

    assert record.config == to_dict(CONFIG)
    assert (record.description, record.tags, record.status) == ("a test", ["x", "y"], "running")
    assert record.columns == {"EDGE": "final_edge_compliance", "RULE": "final_rule_compliance"}
    assert record.curves == {"train_loss": [], "edge_compliance": [], "rule_compliance": []}
    assert record.metrics.scalars["final_rule_compliance"] is None
    assert (record.provenance.command, record.provenance.launches) == (["train"], 1)
    assert record.run_id != make_record().run_id


def test_next_launch_carries_identity_and_results_on():
    earlier = passed_record(status="failed", reason="disk full", created_at="2025-01-01T00:00:00+00:00")
    earlier.provenance = earlier.provenance.model_copy(
        update={"world_sizes": [2], "resumes": [{"step": 4}], "data_fingerprint": "ff", "git_commit": "0"}
    )

    record = new_record(CONFIG, WalksTask, command=["again"], earlier=earlier)

    for name in ("run_id", "created_at", "curves", "metrics", "gate", "timing"):
        assert getattr(record, name) == getattr(earlier, name)
    for name in ("world_sizes", "resumes", "data_fingerprint"):
        assert getattr(record.provenance, name) == getattr(earlier.provenance, name)
    assert (record.status, record.reason, record.finished_at) == ("running", None, None)
    assert (record.provenance.launches, record.provenance.command) == (2, ["again"])
    assert record.provenance.git_commit != "0"


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

    assert read_record(tmp_path).reason == "old"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float32("nan")])
def test_numbers_that_are_not_finite_become_null(tmp_path, value):
    record = make_record()
    record.curves["train_loss"] = [1.5, value]

    write_record(tmp_path, record)

    assert read_record(tmp_path).curves["train_loss"] == [1.5, None]
    validate(read_record(tmp_path).to_dict())


def test_numpy_numbers_are_numbers():
    assert json.loads(strict_json({"a": np.int64(3), "b": (np.float32(0.5), True, None)})) == {
        "a": 3,
        "b": [0.5, True, None],
    }


def test_value_that_is_not_json_is_refused_with_its_place(tmp_path):
    record = make_record()
    record.gate.evidence = {"rules": [1, object()]}
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


@pytest.mark.parametrize(
    ("place", "value"), [("curves", {"train_loss": ["x"]}), ("gate", {"passed": "maybe"}), ("provenance", {})]
)
def test_a_record_with_a_wrong_value_is_damaged(tmp_path, place, value):
    values = make_record().to_dict() | {place: value}
    (tmp_path / RECORD_FILE).write_text(json.dumps(values))
    with pytest.raises(RecordError, match=rf"is damaged \({place}"):
        read_record(tmp_path)
