"""Checkpoints: what is in them, when they count, which are kept, what is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from accel_train.checkpoints import checkpointer as module
from accel_train.checkpoints.manifest import list_checkpoints, newest_sound, survey, verify, write_manifest
from accel_train.checkpoints.random_states import rng_digest
from accel_train.config.sections import CheckpointConfig, TrainingConfig
from accel_train.errors import CheckpointError, CheckpointMismatch, CheckpointsDamaged, NewerFormat
from accel_train.files.atomic import sha256_json
from accel_train.process.fault_points import COMMIT_BEGUN
from accel_train.training.callbacks import Callback
from accel_train.training.commits import Services
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
    train(services=Services(extra_files={"config.yaml": b"seed: 1\n"}))
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
    assert stated == sha256_json(manifest)
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
        with pytest.raises(CheckpointsDamaged, match=r"every checkpoint .*step_0000015.*step_0000005.*start over"):
            train()
    assert not list(directory.glob(".damaged-*"))


def test_leftovers_of_a_killed_save_are_swept_and_never_used(train, directory):
    train()
    torn = directory / ".tmp-step_0000099-abcd"
    shutil.copytree(directory / "step_0000015", torn)
    train()
    assert not torn.exists()
    assert list_checkpoints(directory)[-1][0] == 15


def test_a_checkpoint_of_another_configuration_is_refused(train):
    train()
    with pytest.raises(CheckpointMismatch, match="written under configuration"):
        train(TrainingConfig(max_epochs=3, batch_size=8, learning_rate=0.5))


def test_a_random_state_that_was_not_restored_is_noticed(train, directory, monkeypatch):
    """Accelerate swallows the error; the live digest does not lie."""
    train(TrainingConfig(max_epochs=1, batch_size=8))
    monkeypatch.setattr(torch, "set_rng_state", lambda state: None)
    with pytest.raises(CheckpointMismatch, match=r"random state of rank \[0\] was not restored"):
        train(TrainingConfig(max_epochs=1, batch_size=8))


def test_resume_under_another_arithmetic_is_refused(train, directory, monkeypatch):
    train(TrainingConfig(max_epochs=1, batch_size=8))
    monkeypatch.setattr(
        "accel_train.training.trainer.arithmetic",
        lambda accelerator: {"mixed_precision": "bf16", "compilation": "no", "sharding": "none"},
    )
    with pytest.raises(CheckpointMismatch, match="mixed_precision = 'no', this launch has 'bf16'"):
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

    def full(path, header):
        calls.append(path)
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        write_manifest(path, header)

    monkeypatch.setattr(module, "write_manifest", full)
    with pytest.raises(CheckpointError, match=r"step 4 could not be written .* MB free.*No space left"):
        train(checkpoint=CheckpointConfig(every_steps=2))
    monkeypatch.undo()
    assert len(calls) == 2
    assert not list(directory.glob(".tmp-*")), "what cannot be committed must not keep the disk full"
    assert newest_sound(directory) == directory / "step_0000002"
    assert train(checkpoint=CheckpointConfig(every_steps=2)).state.step == 15


class Held:
    """Keeps the commits of some checkpoints waiting at their begin."""

    def __init__(self, *held: int) -> None:
        self.free = threading.Event()
        self._held, self._commits = held, 0

    def reached(self, point: str) -> None:
        if point == COMMIT_BEGUN:
            self._commits += 1
            if self._commits in self._held:
                assert self.free.wait(30)


class Noted(Callback):
    """What stood on disk at which step, and which commits were reported."""

    def __init__(self, directory: Path, act=lambda step: None) -> None:
        self.directory, self.act = directory, act
        self.seen: dict[int, list[int]] = {}
        self.reported: list[tuple[int, str]] = []

    def on_step_end(self, state) -> None:
        self.act(state.step)
        self.seen[state.step] = [step for step, _ in list_checkpoints(self.directory)]

    def on_checkpoint(self, state, path) -> None:
        assert verify(path) == []
        self.reported.append((state.step, path.name))


def test_training_goes_on_while_a_checkpoint_is_committed(train, directory):
    held = Held(1)
    noted = Noted(directory, lambda step: held.free.set() if step == 4 else None)
    train(
        checkpoint=CheckpointConfig(every_steps=2, keep_last=9),
        callbacks=[noted],
        services=Services(reached=held.reached),
    )
    assert noted.seen[3] == [], "the loop waited for the commit"
    assert [step for step, _ in list_checkpoints(directory)] == [2, 4, 5, 6, 8, 10, 12, 14, 15]
    # Reported by the save after it, or at the end: when it stands for sure.
    assert noted.reported[0] == (4, "step_0000002")
    assert noted.reported[-1] == (15, "step_0000015")
    assert [name for _, name in noted.reported] == [f"step_{s:07d}" for s in (2, 4, 5, 6, 8, 10, 12, 14, 15)]


def test_a_save_waits_for_the_one_before(train, directory):
    held = Held(1)
    threading.Timer(0.5, held.free.set).start()
    started = time.monotonic()
    train(
        TrainingConfig(max_steps=2, batch_size=8),
        checkpoint=CheckpointConfig(every_steps=1),
        services=Services(reached=held.reached),
    )
    assert time.monotonic() - started > 0.4
    assert [step for step, _ in list_checkpoints(directory)] == [1, 2]


def test_a_commit_that_fails_ends_the_run_at_the_next_step_boundary(train, directory, monkeypatch):
    """Not at the next save, which may be hours away."""
    held, failed = threading.Event(), threading.Event()

    def full(path, header):
        held.wait(30)
        failed.set()
        raise OSError(28, "No space left on device")

    def act(step):
        if step == 21:  # Not before: a fast disk could fail within step 20 itself.
            held.set()
            assert failed.wait(30)
        time.sleep(0.01)

    monkeypatch.setattr(module, "write_manifest", full)
    noted = Noted(directory, act)
    forty_steps = TrainingConfig(max_epochs=1, batch_size=1)
    with pytest.raises(CheckpointError, match="step 20 could not be written"):
        train(forty_steps, checkpoint=CheckpointConfig(every_steps=20), callbacks=[noted])
    assert 21 <= max(noted.seen) <= 25
    assert list(directory.iterdir()) == []


def test_a_run_that_fails_still_commits_the_save_in_flight(train, directory):
    held = Held(1)

    def fail(step):
        if step == 3:
            threading.Timer(0.3, held.free.set).start()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(
            checkpoint=CheckpointConfig(every_steps=2),
            callbacks=[Noted(directory, fail)],
            services=Services(reached=held.reached),
        )
    assert newest_sound(directory) == directory / "step_0000002"


def test_rotation_that_fails_costs_nothing_but_space(train, directory, monkeypatch, caplog):
    def stuck(path, **_options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(module.shutil, "rmtree", stuck)
    assert train(checkpoint=CheckpointConfig(keep_last=1)).state.step == 15
    assert "step_0000005 could not be removed" in caplog.text
    assert [step for step, _ in list_checkpoints(directory)] == [15]


def test_verifying_sizes_overlooks_only_a_flipped_byte(train, directory):
    train()
    sizes = CheckpointConfig(verify="size")
    file = directory / "step_0000015" / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert verify(file.parent) == ["model.safetensors does not match its SHA-256"]
    assert verify(file.parent, full=False) == []
    assert train(checkpoint=sizes).state.resumes[-1]["step"] == 15
    file.write_bytes(content[:-1])
    assert verify(file.parent, full=False) == [
        f"model.safetensors has {len(content) - 1} bytes instead of {len(content)}"
    ]
    assert train(checkpoint=sizes).state.resumes[-1]["step"] == 10


def test_when_all_are_damaged_a_restart_must_be_asked_for(train, directory, caplog):
    expected = train().state.train_loss
    for _, path in list_checkpoints(directory):
        (path / "optimizer.bin").unlink()
    again = train(services=Services(restart=True))
    assert "starts over at step 0" in caplog.text
    assert (again.state.resumes, again.state.train_loss) == ([], expected)
    assert len(list(directory.glob(".damaged-*"))) == 3
    assert [step for step, _ in list_checkpoints(directory)] == [5, 10, 15]


def test_survey_of_a_run_tells_sound_damaged_and_set_aside(train, directory):
    train()
    (directory / "step_0000005").rename(directory / ".damaged-step_0000005-ab12")
    file = directory / "step_0000010" / "scheduler.bin"
    file.write_bytes(bytes(len(file.read_bytes())))
    quick, thorough = survey(directory), survey(directory, full=True)
    assert [(c.name, c.problems, c.set_aside) for c in quick] == [
        ("step_0000010", [], False),
        ("step_0000015", [], False),
        (".damaged-step_0000005-ab12", [], True),
    ]
    assert [c.problems for c in thorough] == [["scheduler.bin does not match its SHA-256"], [], []]
    newest = quick[1]
    assert (newest.step, newest.epoch, newest.world_size) == (15, 3, 1)
    assert newest.size == sum(f.stat().st_size for f in (directory / "step_0000015").iterdir())
    assert survey(directory / "missing") == []


def test_newer_format_stops_the_launch_and_stays_in_place(train, directory):
    train()
    path = directory / "step_0000015" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["self_sha256"]
    manifest["format_version"] = 2
    manifest["self_sha256"] = sha256_json(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(NewerFormat, match="update accel_train"):
        train()
    assert path.exists()
    assert not list(directory.glob(".damaged-*"))


@pytest.mark.parametrize("error", [SafetensorError("No space left"), RuntimeError("unexpected pos 576 vs 534")])
def test_failed_write_leaves_no_files_and_names_the_free_space(train, directory, monkeypatch, error):
    def fail(accelerator, output_dir, **kwargs):
        Path(output_dir).mkdir(parents=True)
        raise error

    monkeypatch.setattr("accelerate.Accelerator.save_state", fail)
    with pytest.raises(CheckpointError, match=r"step 5 could not be written .* MB free"):
        train()
    assert list(directory.iterdir()) == []
