"""Manifests: their contract, what counts as damage, and which checkpoint is chosen."""

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accel_train.checkpoints.manifest import (
    MANIFEST,
    list_checkpoints,
    newest_sound,
    read_manifest,
    require_configuration,
    require_data,
    step_directory,
    survey,
    verify,
    write_manifest,
)
from accel_train.errors import CheckpointError, CheckpointMismatch, CheckpointsDamaged, NewerFormat
from accel_train.files.atomic import sha256_json

HEADER = {"epoch": 1, "world_size": 2, "config_hash": "c" * 64, "rng": [{"rank": 0, "sha256": "d" * 64}]}


def checkpoint(directory: Path, step: int, **changes: object) -> Path:
    path = directory / step_directory(step)
    (path / "shards").mkdir(parents=True)
    (path / "model.safetensors").write_bytes(b"weights")
    (path / "shards" / "0.bin").write_bytes(b"shard")
    write_manifest(path, {"step": step, **HEADER, **changes})
    return path


def rewrite(path: Path, **changes: object) -> None:
    """Change fields of a manifest, whose own digest then holds again; None removes a field."""
    content = {name: value for name, value in {**read_manifest(path), **changes}.items() if value is not None}
    (path / MANIFEST).write_text(json.dumps({**content, "self_sha256": sha256_json(content)}))


def harm(path: Path) -> None:
    (path / "model.safetensors").write_bytes(b"WEIGHTS")


def test_manifest_has_the_fields_of_the_contract(tmp_path):
    path = checkpoint(tmp_path, 3)
    content = json.loads((path / MANIFEST).read_text())
    assert content.keys() == {"format_version", "step", *HEADER, "files", "self_sha256"}
    assert content["format_version"] == 1
    assert content["files"].keys() == {"model.safetensors", "shards/0.bin"}


@given(st.integers(0, 10**9), st.integers(0, 99), st.integers(1, 999), st.text())
def test_manifest_survives_a_round_trip(step, epoch, world_size, config_hash):
    header = {"step": step, "epoch": epoch, "world_size": world_size, "config_hash": config_hash, "rng": []}
    with tempfile.TemporaryDirectory() as directory:
        write_manifest(Path(directory), header)
        assert read_manifest(Path(directory)) == {**header, "format_version": 1, "files": {}}


@given(st.data())
def test_any_damage_to_a_manifest_is_reported(data):
    """A changed byte or a truncation is named by ``verify``, which never raises."""
    with tempfile.TemporaryDirectory() as directory:
        path = checkpoint(Path(directory), 3)
        content = (path / MANIFEST).read_bytes()
        position = data.draw(st.integers(0, len(content) - 1))
        if data.draw(st.booleans()):
            changed = content[:position]
        else:
            byte = data.draw(st.integers(0, 255).filter(lambda byte: byte not in b" \t\r\n" + content[position:][:1]))
            changed = content[:position] + bytes([byte]) + content[position + 1 :]
        (path / MANIFEST).write_bytes(changed)

        (problem,) = verify(path)

        assert MANIFEST in problem


@pytest.mark.parametrize("field", ["step", "epoch", "world_size", "config_hash", "rng", "files", "format_version"])
def test_missing_field_is_damage_although_the_digest_holds(tmp_path, field):
    path = checkpoint(tmp_path, 3)
    rewrite(path, **{field: None})
    assert verify(path) == [f"{path / MANIFEST} has no usable field {field!r}"]


@pytest.mark.parametrize(("field", "value"), [("step", "3"), ("rng", {}), ("config_hash", 1), ("files", [])])
def test_field_of_another_type_is_damage(tmp_path, field, value):
    path = checkpoint(tmp_path, 3)
    rewrite(path, **{field: value})
    assert verify(path) == [f"{path / MANIFEST} has no usable field {field!r}"]


def test_newer_format_is_not_damage(tmp_path):
    path = checkpoint(tmp_path, 3)
    rewrite(path, format_version=2)
    with pytest.raises(NewerFormat, match=r"has format 2; this version reads up to 1: update accel_train"):
        verify(path)


def test_file_in_a_subdirectory_is_verified(tmp_path):
    path = checkpoint(tmp_path, 3)
    (path / "shards" / "0.bin").write_bytes(b"SHARD")
    assert verify(path) == ["shards/0.bin does not match its SHA-256"]
    assert verify(path, full=False) == []


def test_name_of_another_step_is_damage(tmp_path):
    path = checkpoint(tmp_path, 3).rename(tmp_path / step_directory(9))
    assert verify(path) == [f"{MANIFEST} is of step 3"]


def test_only_committed_checkpoints_are_listed_in_order_of_steps(tmp_path):
    for name in ("step_10000000", "step_0000009", ".tmp-step_0000011-ab", ".damaged-step_0000001-cd", "step_x"):
        (tmp_path / name).mkdir()
    assert [step for step, _ in list_checkpoints(tmp_path)] == [9, 10_000_000]
    assert list_checkpoints(tmp_path / "missing") == []


@pytest.mark.parametrize("clean_up", [False, True])
def test_newest_sound_passes_over_damaged_ones(tmp_path, caplog, clean_up):
    sound, damaged = checkpoint(tmp_path, 1), checkpoint(tmp_path, 2)
    harm(damaged)

    assert newest_sound(tmp_path, clean_up=clean_up) == sound

    assert "damaged checkpoint step_0000002: model.safetensors does not match its SHA-256" in caplog.text
    assert damaged.exists() != clean_up
    assert len(list(tmp_path.glob(".damaged-step_0000002-*"))) == int(clean_up)


def test_all_damaged_is_an_error_that_moves_nothing(tmp_path):
    for path in (checkpoint(tmp_path, 1), checkpoint(tmp_path, 2)):
        harm(path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(CheckpointsDamaged, match=r"step_0000002: model\.safetensors .*step_0000001: model\.safe"):
        newest_sound(tmp_path, clean_up=True)
    assert sorted(tmp_path.iterdir()) == before


def test_all_damaged_are_set_aside_for_a_restart(tmp_path):
    harm(checkpoint(tmp_path, 1))
    assert newest_sound(tmp_path, clean_up=True, restart=True) is None
    assert list_checkpoints(tmp_path) == []
    assert len(list(tmp_path.glob(".damaged-*"))) == 1


def test_without_checkpoints_there_is_no_newest(tmp_path):
    assert newest_sound(tmp_path) is None
    assert newest_sound(tmp_path / "missing") is None


def test_survey_shows_damaged_and_set_aside_ones(tmp_path):
    checkpoint(tmp_path, 1)
    (checkpoint(tmp_path, 2) / MANIFEST).unlink()
    checkpoint(tmp_path, 3).rename(tmp_path / ".damaged-step_0000003-ab")

    first, second, third = survey(tmp_path, full=True)

    assert (first.step, first.epoch, first.world_size, first.problems) == (1, 1, 2, [])
    assert first.size == sum(file.stat().st_size for file in (tmp_path / first.name).rglob("*") if file.is_file())
    assert (second.name, second.step, second.written_at) == ("step_0000002", None, None)
    assert len(second.problems) == 1
    assert (third.set_aside, third.step) == (True, 3)


def test_another_configuration_is_refused_with_both_hashes(tmp_path):
    path = checkpoint(tmp_path, 1)
    require_configuration(path, "c" * 64, "cure")
    with pytest.raises(CheckpointMismatch, match=r"configuration cccccccc, this is eeeeeeee; do this"):
        require_configuration(path, "e" * 64, "do this")


def test_other_data_is_refused_with_both_digests():
    require_data({"corpus": "a"}, {"corpus": "a"}, 3, "cure")
    with pytest.raises(CheckpointMismatch, match=r"step 3 .*corpus with SHA-256 a, .*SHA-256 b; .*or do this"):
        require_data({"corpus": "a"}, {"corpus": "b"}, 3, "do this")


def test_no_message_names_an_option_of_the_command_line(tmp_path):
    harm(checkpoint(tmp_path, 1))
    with pytest.raises(CheckpointError) as caught:
        newest_sound(tmp_path)
    assert "--" not in str(caught.value)
