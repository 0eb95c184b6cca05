"""The run directory: where it lies, whether it can be written, whose it is."""

import dataclasses
from datetime import datetime
from pathlib import Path

import pytest
import yaml
from configs import experiment_config

from accel_train.config.fields import to_dict
from accel_train.config.identity import experiment_id
from accel_train.config.sections import TrainingConfig
from accel_train.errors import ConfigError, Interrupted, RunLocked
from accel_train.process.work import SILENT, WorkContext
from accel_train.runs.directory import (
    CONFIG_FILE,
    RunDirectory,
    check_output_dir,
    dump_config,
    read_config,
    run_directory,
)
from accel_train.runs.lock import live_runs
from accel_train.runs.record import new_record, read_record, write_record
from accel_train.tasks.walks.task import WalksTask


@pytest.fixture
def config(tmp_path):
    return experiment_config(output_dir=str(tmp_path / "results"), name="mine")


def written(config, directory):
    """A record of an earlier launch in an opened directory."""
    record = new_record(config, WalksTask, init_digest=directory.init_digest)
    write_record(directory.path, record)
    return record


def test_run_lives_under_its_name_or_else_its_id():
    config = experiment_config(output_dir="out")
    assert run_directory(config) == Path("out") / experiment_id(config)
    assert run_directory(dataclasses.replace(config, name="mine")) == Path("out/mine")


def test_output_directory_must_be_writable_and_is_not_created(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")

    check_output_dir(experiment_config(output_dir=str(tmp_path / "new" / "deep")))
    with pytest.raises(ConfigError, match="output_dir"):
        check_output_dir(experiment_config(output_dir=str(tmp_path / "file" / "below")))
    monkeypatch.setattr("os.access", lambda path, _mode: path != tmp_path)  # root may write anywhere
    with pytest.raises(ConfigError, match=r"output_dir.*not writable"):
        check_output_dir(experiment_config(output_dir=str(tmp_path / "new")))

    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_opened_directory_holds_its_configuration_and_a_lock(config):
    first, second = RunDirectory(config), RunDirectory(dataclasses.replace(config, start=config.start))
    assert first.open(SILENT, fresh=False) is None
    try:
        assert read_config(first.path / CONFIG_FILE) == config
        second.config = dataclasses.replace(config, start=type(config.start)(lock_timeout=0.0))
        with pytest.raises(RunLocked, match="is in use by process"):
            second.open(SILENT, fresh=False)
    finally:
        first.close()


def test_the_record_of_an_earlier_launch_is_found(config):
    directory = RunDirectory(config)
    directory.open(SILENT, fresh=False)
    record = written(config, directory)
    directory.close()
    again = RunDirectory(config)
    assert again.open(SILENT, fresh=False).run_id == record.run_id
    again.close()


def test_whoever_waits_for_the_lock_can_be_stopped(config):
    first, second = RunDirectory(config), RunDirectory(config)
    first.open(SILENT, fresh=False)
    try:
        with pytest.raises(Interrupted):
            second.open(WorkContext(should_stop=lambda: True), fresh=False)
    finally:
        first.close()


def test_closing_twice_or_unopened_is_harmless(config):
    directory = RunDirectory(config)
    directory.close()
    directory.open(SILENT, fresh=False)
    directory.close()
    directory.close()
    directory.open(SILENT, fresh=False)
    assert live_runs([directory.path]) == {directory.path}
    directory.close()
    assert live_runs([directory.path]) == set()


def test_a_place_that_cannot_be_made_is_refused(config, tmp_path):
    (tmp_path / "results").write_text("")
    for attempt in (lambda: RunDirectory(config).open(SILENT, fresh=False), RunDirectory(config).leave_token):
        with pytest.raises(ConfigError, match=r"output_dir: .* cannot be written"):
            attempt()


@pytest.mark.parametrize(("status", "kept"), [("completed", True), ("preempted", False)])
def test_only_a_completed_run_keeps_its_config_file(config, status, kept):
    """What does not change the result may be given anew to a run that goes on."""
    directory = RunDirectory(config)
    directory.open(SILENT, fresh=False)
    write_record(directory.path, written(config, directory).model_copy(update={"status": status}))
    directory.close()
    again = RunDirectory(dataclasses.replace(config, description="said later"))
    again.open(SILENT, fresh=False)
    again.close()
    assert (read_config(directory.path / CONFIG_FILE).description == "") == kept


def test_another_configuration_is_refused_field_by_field(config):
    directory = RunDirectory(config)
    directory.open(SILENT, fresh=False)
    directory.close()
    before = (directory.path / CONFIG_FILE).read_bytes()
    other = RunDirectory(dataclasses.replace(config, training=TrainingConfig(learning_rate=0.5), seed=7))
    with pytest.raises(ConfigError) as caught:
        other.open(SILENT, fresh=False)
    other.close()
    assert (directory.path / CONFIG_FILE).read_bytes() == before
    assert "seed: 7 here, 42 there" in str(caught.value)
    assert "training.learning_rate: 0.5 here, 0.0003 there" in str(caught.value)
    assert "--fresh" in str(caught.value)


def test_fresh_archives_what_is_there_and_says_so(config):
    said = []
    directory = RunDirectory(config)
    directory.open(SILENT, fresh=False)
    record = written(config, directory)
    directory.close()
    again = RunDirectory(config)
    assert again.open(WorkContext(lambda phase, what: said.append(phase)), fresh=True) is None
    again.close()
    archive = next(path for path in directory.path.parent.iterdir() if ".archived-" in path.name)
    assert read_record(archive).run_id == record.run_id
    assert said == ["archive"]


def test_the_archive_holds_everything_but_the_lock(config):
    directory = RunDirectory(config)
    directory.open(SILENT, fresh=False)
    written(config, directory)
    names = ["checkpoints", "figures", "samples", "logs", "tracking"]
    for name in names:
        (directory.path / name).mkdir()
    files = ["metrics.jsonl", "validation_report.json", "notes of mine.txt"]
    for name in files:
        (directory.path / name).write_text("")
    directory.close()
    directory.open(SILENT, fresh=True)
    directory.close()
    [archive] = directory.path.parent.glob("mine.archived-*")
    assert {path.name for path in archive.iterdir()} == {*names, *files, "result.json", CONFIG_FILE}
    assert {path.name for path in directory.path.iterdir()} & {*names, *files, "result.json"} == set()


def test_a_kill_while_archiving_leaves_no_finished_run(config, monkeypatch):
    """The record is moved first: what stays behind must not look completed."""

    class Killed(BaseException):
        pass

    rename, moved = Path.rename, []

    def killed(path, target):
        if path.parent == directory.path and moved:
            raise Killed
        if path.parent == directory.path:
            moved.append(path.name)
        return rename(path, target)

    directory = RunDirectory(config)
    directory.open(SILENT, fresh=False)
    written(config, directory)
    (directory.path / "checkpoints").mkdir()
    directory.close()
    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(Killed):
        directory.open(SILENT, fresh=True)
    directory.close()
    assert moved == ["result.json"]


def test_archives_of_one_second_have_names_of_their_own(config, monkeypatch):
    class Clock:
        @staticmethod
        def now(zone):
            return datetime(2026, 1, 2, 3, 4, 5, tzinfo=zone)

    monkeypatch.setattr("accel_train.runs.directory.datetime", Clock)
    directory = RunDirectory(config)
    for fresh in (False, True, True, True):
        directory.open(SILENT, fresh=fresh)
        directory.close()
    stem = "mine.archived-20260102T030405"
    assert {path.name for path in directory.path.parent.iterdir()} == {"mine", stem, f"{stem}-2", f"{stem}-3"}


def test_fresh_with_nothing_there_archives_nothing(config):
    said = []
    directory = RunDirectory(config)
    directory.open(WorkContext(lambda phase, what: said.append(phase)), fresh=True)
    directory.close()
    assert said == []
    assert [path.name for path in directory.path.parent.iterdir()] == ["mine"]


@pytest.mark.parametrize("fresh", [False, True])
def test_fresh_is_the_way_past_another_configuration(config, fresh):
    directory = RunDirectory(config)
    directory.open(SILENT, fresh=False)
    directory.close()
    other = RunDirectory(dataclasses.replace(config, seed=7))
    if fresh:
        assert other.open(SILENT, fresh=True) is None
    else:
        with pytest.raises(ConfigError, match="is a run of another configuration"):
            other.open(SILENT, fresh=False)
    other.close()


def test_a_directory_of_an_older_version_is_refused_in_one_line(config):
    directory = RunDirectory(config)
    directory.path.mkdir(parents=True)
    old = {**to_dict(config), "graph": {"n": 500}, "gate": {}}
    (directory.path / CONFIG_FILE).write_text(yaml.safe_dump(old))
    with pytest.raises(ConfigError, match="was not written by this version") as caught:
        directory.open(SILENT, fresh=False)
    directory.close()
    assert "\n" not in str(caught.value)
    assert "gate: {} is not a field" in str(caught.value)


def test_weights_of_another_digest_are_refused_under_a_name(config):
    directory = RunDirectory(config, "a" * 64)
    directory.open(SILENT, fresh=False)
    written(config, directory)
    directory.close()
    other = RunDirectory(config, "b" * 64)
    with pytest.raises(ConfigError, match=r"start\.weights"):
        other.open(SILENT, fresh=False)
    other.close()


def test_a_stored_configuration_is_read_back(config, tmp_path):
    path = tmp_path / CONFIG_FILE
    path.write_text(dump_config(config))
    assert read_config(path) == config


@pytest.mark.parametrize("text", ["", "[1]", "{", "task: walks\nseed: x\n"])
def test_a_file_that_is_no_configuration_is_refused(tmp_path, text):
    path = tmp_path / CONFIG_FILE
    path.write_text(text)
    with pytest.raises(ConfigError, match="config"):
        read_config(path)


def test_tokens_are_seen_and_removed(config):
    directory = RunDirectory(config)
    token = directory.leave_token()
    assert directory.sees_token(token, 1.0)
    directory.remove_token(token, refused=True)
    assert not directory.path.exists(), "a refused directory that holds nothing else goes too"


@pytest.mark.parametrize("refused", [False, True])
def test_a_directory_in_use_stays_without_its_token(config, refused):
    """Another launch of the same run may be about to use it."""
    directory = RunDirectory(config)
    token = directory.leave_token()
    (directory.path / "theirs").write_text("")
    directory.remove_token(token, refused=refused)
    assert [path.name for path in directory.path.iterdir()] == ["theirs"]


def test_an_empty_directory_that_is_not_refused_stays(config):
    directory = RunDirectory(config)
    directory.remove_token(directory.leave_token(), refused=False)
    assert list(directory.path.iterdir()) == []


def test_a_token_of_elsewhere_is_not_seen(config):
    directory = RunDirectory(config)
    directory.leave_token()
    assert not directory.sees_token(".seen-by-all-other", 0.0)
