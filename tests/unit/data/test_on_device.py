"""Samples from a stream on a device are those of their dataset."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from accel_train.data import on_device as module
from accel_train.data.on_device import SamplesOnDevice, copy_to_device
from accel_train.data.windows import WindowDataset, split_corpus
from accel_train.tasks.text.builtin import builtin_text
from accel_train.tasks.text.tokenizer import train_tokenizer
from accel_train.tasks.text.tokens import Tokens, write_tokens
from accel_train.tasks.walks.dataset import WalkDataset

CPU = torch.device("cpu")


def walks() -> WalkDataset:
    # 23 tokens hold three chunks of 7, and two tokens that no sample uses.
    return WalkDataset(np.arange(10 * 23, dtype=np.uint16).reshape(10, 23), 6)


def windows() -> WindowDataset:
    tokens = np.random.default_rng(0).integers(300, size=1000, dtype=np.uint16)
    _, held_out = split_corpus(len(tokens), 8, 0.2, "blocks")
    return WindowDataset(tokens, 8, held_out, stride=3)


def assert_same(dataset, block: int | None = None) -> None:
    copy = SamplesOnDevice(dataset, CPU)
    assert len(copy) == len(dataset)
    ids = np.random.default_rng(1).permutation(len(dataset))
    for ours, theirs in zip(copy.__getitems__(ids), dataset.__getitems__(ids), strict=True):
        assert ours.dtype == torch.int64
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("make", [walks, windows])
@pytest.mark.parametrize("at_once", [7, 23, 64, 1 << 22])
def test_every_sample_is_the_same(make, at_once, monkeypatch):
    monkeypatch.setattr(module, "_TOKENS_AT_ONCE", at_once)
    assert_same(make())


def test_tokens_of_several_shards(tmp_path):
    tokenizer = train_tokenizer("bpe", builtin_text(20_000, 0), 300)
    write_tokens(tmp_path, builtin_text(20_000, 0), tokenizer, "0" * 64, shard_tokens=1000)
    assert_same(WindowDataset(Tokens(tmp_path), 16))


def test_a_dataset_may_need_more_than_a_file_of_16_bits_holds(monkeypatch):
    tokens = np.array([0, 2**16, 2**31 - 1, 5, 6], dtype=np.uint32)
    assert_same(WindowDataset(tokens, 2))


@pytest.mark.parametrize("ids", [[-1], [30]])
def test_an_id_outside_is_an_error_and_no_read_elsewhere(ids):
    with pytest.raises(IndexError, match="sample ids must lie in"):
        SamplesOnDevice(walks(), CPU).__getitems__(np.array(ids))


def test_only_what_fits_on_a_gpu_goes_there(monkeypatch):
    copied = []
    monkeypatch.setattr(module, "SamplesOnDevice", lambda dataset, device: copied.append(dataset) or "copy")
    free = 4 * walks().stream_length * 4
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2 * free))
    gpu = torch.device("cuda")
    assert copy_to_device(walks(), gpu) == "copy"
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free - 1, 2 * free))
    assert copy_to_device(walks(), gpu) is None
    assert copy_to_device(walks(), CPU) is None
    assert copy_to_device([1, 2, 3], gpu) is None
    assert len(copied) == 1
