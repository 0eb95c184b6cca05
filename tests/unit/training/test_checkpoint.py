"""Checkpoints: what is in them, when they count, which are kept, what is refused."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from accel_train.config import CheckpointConfig, TrainingConfig, canonical_json
from accel_train.training import checkpoint as module
from accel_train.training.checkpoint import (
    CheckpointError,
    NewerFormat,
    derive_rank_seed,
    list_checkpoints,
    newest_sound,
    rng_digest,
    verify,
)
from accel_train.training.state import TrainingState
from accel_train.training.trainer import Trainer

CONFIG = TrainingConfig(max_epochs=3, batch_size=8, log_interval=2)


@pytest.fixture
def train(tiny_model, tiny_dataset, tmp_path):
    """Train (or resume) three epochs of five steps in ``tmp_path``; keyword arguments go to the Trainer."""

    def run(config=CONFIG, **kwargs) -> Trainer:
        trainer = Trainer(tiny_model(dropout=0.1), tiny_dataset(), config, run_dir=tmp_path, **kwargs)
        trainer.fit()
        return trainer

    return run


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "checkpoints"


def test_a_checkpoint_holds_the_files_of_the_contract_and_their_digests(train, directory):
    train(extra_files={"config.yaml": b"seed: 1\n"})
    path = directory / "step_0000015"
    manifest = json.loads((path / "manifest.json").read_text())
    assert set(manifest) == {
        "format_version", "step", "epoch", "world_size", "config_hash", "files", "rng", "self_sha256",
    }  # fmt: skip
    assert (manifest["format_version"], manifest["step"], manifest["epoch"], manifest["world_size"]) == (1, 15, 3, 1)
    assert set(manifest["files"]) == {
        "model.safetensors", "optimizer.bin", "scheduler.bin", "random_states_0.pkl", "state.json",
        "losses.safetensors", "config.yaml",
    }  # fmt: skip
    assert set(manifest["files"]) | {"manifest.json"} == {file.name for file in path.iterdir()}
    for name, entry in manifest["files"].items():
        content = (path / name).read_bytes()
        assert entry == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    stated = manifest.pop("self_sha256")
    assert stated == hashlib.sha256(canonical_json(manifest).encode()).hexdigest()
    assert manifest["rng"] == [{"rank": 0, "sha256": rng_digest(torch.device("cpu"))}]


def test_the_last_checkpoints_and_the_one_that_passed_are_kept(train, directory):
    train(
        TrainingConfig(max_epochs=6, batch_size=8),
        checkpoint=CheckpointConfig(keep_last=2),
        evaluate=lambda model, state, should_stop: {"passed": state.step == 10},
    )
    assert [step for step, _ in list_checkpoints(directory)] == [10, 25, 30]
    assert not [path for path in directory.iterdir() if path.name.startswith(".")]


def test_checkpoints_also_come_every_so_many_steps(train, directory):
    train(checkpoint=CheckpointConfig(every_steps=4, keep_last=50))
    assert [step for step, _ in list_checkpoints(directory)] == [4, 5, 8, 10, 12, 15]


@pytest.mark.parametrize("damage", ["truncate", "empty", "flip", "delete"])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.bin", "random_states_0.pkl", "manifest.json"])
def test_damage_is_found_and_the_checkpoint_before_is_used(train, directory, caplog, name, damage):
    train()
    file = directory / "step_0000015" / name
    content = file.read_bytes()
    if damage == "delete":
        file.unlink()
    else:
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        file.write_bytes({"truncate": content[:-1], "empty": b"", "flip": flipped}[damage])
    assert verify(directory / "step_0000015")
    assert newest_sound(directory) == directory / "step_0000010"
    again = train()
    assert again.state.resumes[-1]["step"] == 10
    assert "step_0000015" in caplog.text
    assert len(list(directory.glob(".damaged-step_0000015-*"))) == 1
    assert verify(directory / "step_0000015") == []


def test_when_all_are_damaged_nothing_restarts_silently(train, directory):
    train()
    for _, path in list_checkpoints(directory):
        (path / "model.safetensors").write_bytes(b"")
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"every checkpoint .*step_0000015.*step_0000005.*--fresh"):
            train()


def test_leftovers_of_a_killed_save_are_swept_and_never_used(train, directory):
    train()
    torn = directory / ".tmp-step_0000099-abcd"
    shutil.copytree(directory / "step_0000015", torn)
    train()
    assert not torn.exists()
    assert list_checkpoints(directory)[-1][0] == 15


def test_a_checkpoint_of_another_configuration_is_refused(train):
    train()
    with pytest.raises(CheckpointError, match="written under configuration"):
        train(TrainingConfig(max_epochs=3, batch_size=8, learning_rate=0.5))


def test_a_random_state_that_was_not_restored_is_noticed(train, directory, monkeypatch):
    """Accelerate swallows the error; the live digest does not lie."""
    train(TrainingConfig(max_epochs=1, batch_size=8))
    monkeypatch.setattr(torch, "set_rng_state", lambda state: None)
    with pytest.raises(CheckpointError, match=r"random state of rank \[0\] was not restored"):
        train(TrainingConfig(max_epochs=1, batch_size=8))


def test_a_resume_under_another_arithmetic_is_refused_with_both_values(train, directory, monkeypatch):
    train(TrainingConfig(max_epochs=1, batch_size=8))
    monkeypatch.setattr(
        "accel_train.training.trainer.arithmetic",
        lambda accelerator: {"mixed_precision": "bf16", "compilation": "no", "sharding": "none"},
    )
    with pytest.raises(CheckpointError, match="mixed_precision = 'no', this launch has 'bf16'"):
        train(TrainingConfig(max_epochs=1, batch_size=8))


def test_another_thread_count_is_a_warning_and_recorded(train, caplog):
    train(TrainingConfig(max_epochs=1, batch_size=8))
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        trainer = train(TrainingConfig(max_epochs=1, batch_size=8))
    finally:
        torch.set_num_threads(before)
    assert trainer.state.resumes[-1]["changes"] == {"threads": [before, before + 1]}
    assert f"threads = {before + 1} instead of {before}" in caplog.text


def test_a_failed_save_leaves_the_earlier_checkpoint_intact(train, directory, monkeypatch):
    calls = []

    def full(path):
        calls.append(path)
        if len(calls) > 1:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "fsync_directory", full)
    with pytest.raises(OSError, match="No space left"):
        train(checkpoint=CheckpointConfig(every_steps=2))
    monkeypatch.undo()
    assert len(calls) == 2
    assert newest_sound(directory) == directory / "step_0000002"
    assert train(checkpoint=CheckpointConfig(every_steps=2)).state.step == 15


@pytest.mark.parametrize("draw", [random.random, np.random.rand, lambda: torch.rand(1)])
def test_the_rng_digest_sees_every_generator(draw):
    before = rng_digest(torch.device("cpu"))
    assert rng_digest(torch.device("cpu")) == before
    draw()
    assert rng_digest(torch.device("cpu")) != before


def test_new_ranks_get_random_states_of_their_own():
    seeds = {derive_rank_seed(42, step, rank) for step in range(10) for rank in range(10)}
    assert len(seeds) == 100
    assert derive_rank_seed(42, 3, 1) == derive_rank_seed(42, 3, 1)


def test_the_training_state_survives_a_round_trip(tmp_path):
    state = TrainingState(step=2, epoch=1, fingerprint=2**64 - 1, train_loss=[0.1, 1 / 3], world_sizes=[1, 2])
    state.save(tmp_path)
    assert TrainingState.load(tmp_path) == state


def test_a_training_state_of_another_version_or_with_missing_losses_is_refused(tmp_path):
    TrainingState(step=2, train_loss=[0.1]).save(tmp_path)
    with pytest.raises(ValueError, match="1 losses for 2 steps"):
        TrainingState.load(tmp_path)
    values = json.loads((tmp_path / "state.json").read_text())
    (tmp_path / "state.json").write_text(json.dumps({**values, "novelty": 1}))
    with pytest.raises(ValueError, match="novelty"):
        TrainingState.load(tmp_path)


def test_a_newer_format_is_not_damage_and_nothing_is_trained_over_it(train, directory):
    train()
    path = directory / "step_0000015" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["self_sha256"]
    manifest["format_version"] = 2
    manifest["self_sha256"] = hashlib.sha256(canonical_json(manifest).encode()).hexdigest()
    path.write_text(json.dumps(manifest))
    with pytest.raises(NewerFormat, match="update accel_train"):
        train()
    assert path.exists()
    assert not list(directory.glob(".damaged-*"))


@pytest.mark.parametrize("error", [SafetensorError("No space left"), RuntimeError("unexpected pos 576 vs 534")])
def test_a_write_that_fails_leaves_no_torn_files_and_says_what_to_look_at(train, directory, monkeypatch, error):
    def fail(accelerator, output_dir, **kwargs):
        Path(output_dir).mkdir(parents=True)
        raise error

    monkeypatch.setattr("accelerate.Accelerator.save_state", fail)
    with pytest.raises(CheckpointError, match=r"step 5 could not be written .* MB free"):
        train()
    assert list(directory.iterdir()) == []
