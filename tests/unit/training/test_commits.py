"""What a launch must share with the checkpoint it goes on from, and what it notes of the rest."""

from __future__ import annotations

import logging

import pytest

from accel_train.checkpoints.state import TrainingState
from accel_train.errors import CheckpointMismatch
from accel_train.training.commits import note_resume

ARITHMETIC = {"mixed_precision": "bf16", "compilation": "no", "sharding": "none"}
MACHINE = {"device": "cpu", "torch": "2.6.0", "num_processes": 2}
DATA = {"walks": "a" * 64}


@pytest.fixture
def state():
    return TrainingState(step=7, arithmetic=dict(ARITHMETIC), machine=dict(MACHINE), data=dict(DATA))


@pytest.fixture(autouse=True)
def warnings(caplog):
    """The warnings so far, as a function."""
    caplog.set_level(logging.INFO, logger="accel_train.training.commits")
    return lambda: [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_the_same_launch_is_noted_without_a_warning(state, warnings):
    note_resume(state, ARITHMETIC, dict(MACHINE), DATA)
    assert state.resumes == [{"step": 7, "world_size": 2, "changes": {}}]
    assert warnings() == []


@pytest.mark.parametrize(
    ("name", "value"), [("mixed_precision", "no"), ("compilation", "inductor"), ("sharding", "fsdp")]
)
def test_other_arithmetic_is_refused_with_both_values(state, name, value):
    with pytest.raises(CheckpointMismatch) as caught:
        note_resume(state, {**ARITHMETIC, name: value}, dict(MACHINE), DATA)
    assert f"step 7 was trained with {name} = {ARITHMETIC[name]!r}, this launch has {value!r}" in str(caught.value)
    assert state.resumes == []


def test_other_data_is_refused_with_both_digests(state):
    with pytest.raises(CheckpointMismatch, match=f"walks with SHA-256 {'a' * 64}, here is .* {'b' * 64}"):
        note_resume(state, ARITHMETIC, dict(MACHINE), {"walks": "b" * 64})
    assert state.resumes == []


def test_another_machine_is_a_warning_and_is_kept(state, warnings):
    note_resume(state, ARITHMETIC, {**MACHINE, "torch": "2.7.0"}, DATA)
    assert warnings() == ["resuming with torch = '2.7.0' instead of '2.6.0': the bits may differ"]
    assert state.resumes[0]["changes"] == {"torch": ["2.6.0", "2.7.0"]}
    assert state.machine == {**MACHINE, "torch": "2.7.0"}


@pytest.mark.parametrize(("world_size", "is_new"), [(1, False), (3, True)])
def test_only_added_ranks_start_with_derived_random_states(state, warnings, world_size, is_new):
    note_resume(state, ARITHMETIC, {**MACHINE, "num_processes": world_size}, DATA)
    assert any(text.startswith("ranks that are new start with random states") for text in warnings()) is is_new
    assert state.resumes[0]["world_size"] == world_size
