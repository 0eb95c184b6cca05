"""The training state comes back as it was saved, and what is no state of this version is refused."""

import json
import tempfile
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from accel_train.checkpoints.state import LOSSES_FILE, STATE_FILE, TrainingState

counts = st.integers(0, 2**53)
texts = st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3)
numbers = st.floats(allow_nan=False, allow_infinity=False)
states = st.builds(
    lambda losses, **values: TrainingState(step=len(losses), train_loss=losses, **values),
    losses=st.lists(numbers, max_size=5),
    epoch=counts,
    step_in_epoch=counts,
    tokens_seen=counts,
    fingerprint=st.integers(0, 2**64 - 1),
    evaluations=st.lists(st.dictionaries(st.text(max_size=5), numbers, max_size=3), max_size=2),
    evaluation_due=st.booleans(),
    keep_step=st.none() | counts,
    best_loss=st.none() | numbers,
    world_sizes=st.lists(st.integers(1, 64), max_size=3),
    data=texts,
    arithmetic=texts,
)


@given(states)
def test_state_survives_a_round_trip(state):
    with tempfile.TemporaryDirectory() as directory:
        state.save(Path(directory))
        assert TrainingState.load(Path(directory)) == state


def test_every_field_is_saved(tmp_path):
    TrainingState().save(tmp_path)
    saved = set(json.loads((tmp_path / STATE_FILE).read_text()))
    assert saved | {"train_loss"} == {field.name for field in fields(TrainingState)}


def test_fingerprint_is_saved_as_text(tmp_path):
    """64 bits do not fit the numbers of every JSON reader."""
    TrainingState(fingerprint=255).save(tmp_path)
    assert json.loads((tmp_path / STATE_FILE).read_text())["fingerprint"] == "00000000000000ff"


def test_field_missing_from_an_older_file_gets_its_default(tmp_path):
    TrainingState(skipped_steps=3).save(tmp_path)
    values = json.loads((tmp_path / STATE_FILE).read_text())
    del values["skipped_steps"]
    (tmp_path / STATE_FILE).write_text(json.dumps(values))
    assert TrainingState.load(tmp_path).skipped_steps == 0


def test_unknown_field_is_refused_by_name(tmp_path):
    TrainingState().save(tmp_path)
    values = json.loads((tmp_path / STATE_FILE).read_text())
    (tmp_path / STATE_FILE).write_text(json.dumps({**values, "novelty": 1}))
    with pytest.raises(ValueError, match="novelty"):
        TrainingState.load(tmp_path)


def test_losses_of_another_number_of_steps_are_refused(tmp_path):
    TrainingState(step=2, train_loss=[0.1]).save(tmp_path)
    with pytest.raises(ValueError, match="1 losses for 2 steps"):
        TrainingState.load(tmp_path)


HOSTILE = {
    "list": "[]",
    "no step": '{"fingerprint": "0"}',
    "torn": '{"step": 0, "fing',
    "fingerprint that is no text": '{"step": 0, "fingerprint": 7}',
    "fingerprint that is no number": '{"step": 0, "fingerprint": "x"}',
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE.keys())
def test_json_that_is_no_state_is_a_value_error(tmp_path, content):
    TrainingState().save(tmp_path)
    (tmp_path / STATE_FILE).write_text(content)
    with pytest.raises(ValueError):  # noqa: PT011 - the kind is what callers handle
        TrainingState.load(tmp_path)


def test_losses_under_another_name_are_a_value_error(tmp_path):
    TrainingState().save(tmp_path)
    save_file({"other": torch.zeros(1)}, tmp_path / LOSSES_FILE)
    with pytest.raises(ValueError, match="train_loss"):
        TrainingState.load(tmp_path)
