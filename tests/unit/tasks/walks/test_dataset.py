"""Walks are cut into chunks of one token more than the context."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from accel_train.tasks.walks.dataset import WalkDataset


def numbered_walks(num_walks, walk_length, dtype=np.uint16):
    return np.arange(num_walks * walk_length, dtype=dtype).reshape(num_walks, walk_length)


@given(num_walks=st.integers(1, 5), walk_length=st.integers(2, 40), data=st.data())
def test_every_sample_is_its_chunk_of_its_walk(num_walks, walk_length, data):
    context = data.draw(st.integers(1, walk_length - 1))
    walks = numbered_walks(num_walks, walk_length)
    dataset = WalkDataset(walks, context)
    chunk = context + 1
    expected = [walk[i * chunk : (i + 1) * chunk].tolist() for walk in walks for i in range(walk_length // chunk)]
    assert len(dataset) == len(expected)
    for index, tokens in enumerate(expected):
        inputs, targets = dataset[index]
        assert inputs.tolist() == tokens[:-1]
        assert targets.tolist() == tokens[1:]


def test_the_usual_walk_of_k_contexts_gives_k_minus_one_chunks():
    assert len(WalkDataset(numbered_walks(10, 256), 64)) == 10 * 3


@pytest.mark.parametrize("ids", [[5, 0, 5, 2], np.array([5, 0, 5, 2])])
def test_a_batch_is_its_samples_stacked(ids):
    dataset = WalkDataset(numbered_walks(4, 9), 3)
    inputs, targets = dataset.__getitems__(ids)
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.shape == targets.shape == (4, 3)
    for row, index in enumerate(ids):
        assert torch.equal(inputs[row], dataset[index][0])
        assert torch.equal(targets[row], dataset[index][1])


def test_inputs_and_targets_share_their_memory():
    inputs, targets = WalkDataset(numbered_walks(4, 9), 3).__getitems__([1, 2])
    assert inputs.untyped_storage().data_ptr() == targets.untyped_storage().data_ptr()


def test_tokens_above_a_signed_half_stay_positive():
    inputs, _ = WalkDataset(np.array([[65_535, 40_000, 1]], dtype=np.uint16), 2)[0]
    assert inputs.tolist() == [65_535, 40_000]


def test_a_memory_map_is_not_copied(tmp_path):
    np.save(tmp_path / "walks.npy", numbered_walks(4, 10))
    walks = np.load(tmp_path / "walks.npy", mmap_mode="r")
    dataset = WalkDataset(walks, 3)
    assert np.shares_memory(dataset._chunks, walks)
    assert dataset[3][0].tolist() == [14, 15, 16]


@pytest.mark.parametrize("index", [8, -9])
def test_an_id_out_of_range_is_refused(index):
    dataset = WalkDataset(numbered_walks(4, 9), 3)
    with pytest.raises(IndexError):
        dataset[index]


@pytest.mark.parametrize("shape", [(4, 3), (12,)])
def test_walks_that_hold_no_chunk_are_refused(shape):
    with pytest.raises(ValueError, match="context_length \\+ 1 = 4"):
        WalkDataset(np.zeros(shape, dtype=np.uint16), 3)
