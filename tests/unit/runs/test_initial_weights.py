"""The weights that a run begins with."""

import hashlib
import shutil
from dataclasses import replace

import pytest
import torch
from configs import experiment_config
from safetensors.torch import save_file

from accel_train.checkpoints.manifest import write_manifest
from accel_train.config.sections import ModelConfig, StartConfig
from accel_train.errors import CheckpointError, ConfigError
from accel_train.runs.directory import run_directory
from accel_train.runs.initial_weights import WEIGHTS, build_model, require_same_files, resolve_weights
from accel_train.runs.record import new_record, write_record
from accel_train.tasks.registry import build_task
from accel_train.tasks.walks.task import WalksTask

CONFIG = experiment_config(model=ModelConfig(d_model=16, n_layers=1, n_heads=2, max_seq_len=16))
HEADER = {"step": 3, "epoch": 0, "world_size": 1, "config_hash": "0" * 64, "rng": []}


@pytest.fixture
def checkpoint(tmp_path):
    """A sound checkpoint with the weights of seed 5."""
    path = tmp_path / "step_0000003"
    path.mkdir()
    task = build_task(CONFIG)
    save_file(build_model(replace(CONFIG, seed=5), task, None).state_dict(), path / WEIGHTS)
    write_manifest(path, HEADER)
    return path


def starting_from(path, **changes):
    return replace(CONFIG, start=StartConfig(weights=str(path)), **changes)


def record_at(run_dir, config=CONFIG, status="completed", **identity):
    run_dir.mkdir(parents=True, exist_ok=True)
    record = new_record(config, WalksTask, **identity)
    write_record(run_dir, record.model_copy(update={"status": status}))


@pytest.fixture
def source(tmp_path, checkpoint):
    """Make a run with two checkpoints, of which the second has the weights of seed 5."""

    def make(status):
        run_dir = tmp_path / "source"
        record_at(run_dir, status=status)
        shutil.copytree(checkpoint, run_dir / "checkpoints" / "step_0000003")
        newest = run_dir / "checkpoints" / "step_0000010"
        newest.mkdir()
        (newest / WEIGHTS).write_bytes((checkpoint / WEIGHTS).read_bytes())
        write_manifest(newest, HEADER | {"step": 10})
        return run_dir

    return make


def test_fresh_weights_are_those_of_the_seed():
    task = build_task(CONFIG)
    first, again = build_model(CONFIG, task, None), build_model(CONFIG, task, None)
    other = build_model(replace(CONFIG, seed=7), task, None)
    assert torch.equal(first.token_embedding.weight, again.token_embedding.weight)
    assert not torch.equal(first.token_embedding.weight, other.token_embedding.weight)


def test_weights_of_a_checkpoint_are_loaded(checkpoint):
    task = build_task(CONFIG)
    loaded = build_model(CONFIG, task, checkpoint)
    assert torch.equal(
        loaded.token_embedding.weight, build_model(replace(CONFIG, seed=5), task, None).token_embedding.weight
    )


def test_a_model_of_another_size_is_refused_by_the_field(checkpoint):
    config = replace(CONFIG, model=replace(CONFIG.model, d_model=32))
    with pytest.raises(ConfigError, match=r"start\.weights.*does not fit this model"):
        build_model(config, build_task(config), checkpoint)


def test_a_file_that_is_no_safetensors_is_an_error(checkpoint):
    (checkpoint / WEIGHTS).write_bytes(b"no weights")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        build_model(CONFIG, build_task(CONFIG), checkpoint)


def test_a_checkpoint_resolves_to_itself_and_its_digest(checkpoint):
    digest = hashlib.sha256((checkpoint / WEIGHTS).read_bytes()).hexdigest()
    assert resolve_weights(starting_from(checkpoint)) == (checkpoint, digest)


def test_a_completed_run_resolves_to_its_newest_checkpoint(source):
    run_dir = source("completed")
    newest = run_dir / "checkpoints" / "step_0000010"
    digest = hashlib.sha256((newest / WEIGHTS).read_bytes()).hexdigest()
    assert resolve_weights(starting_from(run_dir)) == (newest, digest)


@pytest.mark.parametrize("status", ["running", "preempted", "failed"])
def test_a_run_that_is_not_completed_is_refused(source, status):
    with pytest.raises(ConfigError, match="is a run that is not completed") as caught:
        resolve_weights(starting_from(source(status)))
    assert "step_0000010" in str(caught.value), "one of its checkpoints can be named instead"


def test_a_checkpoint_of_an_unfinished_run_can_be_named(source):
    path = source("running") / "checkpoints" / "step_0000003"
    assert resolve_weights(starting_from(path))[0] == path


def test_a_damaged_newest_checkpoint_is_not_passed_over(source):
    run_dir = source("completed")
    (run_dir / "checkpoints" / "step_0000010" / WEIGHTS).write_bytes(b"no weights")
    with pytest.raises(ConfigError, match="holds no sound checkpoint"):
        resolve_weights(starting_from(run_dir))


def test_a_checkpoint_without_weights_is_refused(tmp_path):
    write_manifest(tmp_path, HEADER)
    with pytest.raises(ConfigError, match=r"model\.safetensors is missing"):
        resolve_weights(starting_from(tmp_path))


@pytest.fixture
def begun(tmp_path):
    """A named run with a checkpoint of its own, whose source is gone."""
    config = starting_from(tmp_path / "gone", name="mine", output_dir=str(tmp_path / "results"))
    run_dir = run_directory(config)
    record_at(run_dir, config, "preempted", init_digest="a" * 64)
    (run_dir / "checkpoints" / "step_0000001").mkdir(parents=True)
    return config


def test_a_named_run_keeps_the_digest_it_began_with(begun):
    assert resolve_weights(begun) == (None, "a" * 64)


def test_a_fresh_start_needs_the_source_again(begun):
    with pytest.raises(ConfigError, match="is not a directory"):
        resolve_weights(begun, fresh=True)


def test_a_named_run_with_another_source_resolves_it(begun, checkpoint):
    config = replace(begun, start=StartConfig(weights=str(checkpoint)))
    assert resolve_weights(config)[0] == checkpoint


def test_a_damaged_checkpoint_is_refused(checkpoint):
    (checkpoint / WEIGHTS).write_bytes(b"no weights")
    with pytest.raises(ConfigError, match="holds no sound checkpoint"):
        resolve_weights(starting_from(checkpoint))


@pytest.mark.parametrize("name", ["nowhere", "file"])
def test_what_is_no_directory_is_refused(tmp_path, name):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"start\.weights.*is not a directory"):
        resolve_weights(starting_from(tmp_path / name))


def test_weights_learned_with_another_tokenizer_are_refused(checkpoint):
    class Task:
        def files(self):
            return {"tokenizer.json": b"mine"}

    require_same_files(checkpoint, Task())
    (checkpoint / "tokenizer.json").write_bytes(b"theirs")
    with pytest.raises(ConfigError, match=r"tokenizer\.json of SHA-256"):
        require_same_files(checkpoint, Task())
