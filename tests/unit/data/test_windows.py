import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from accel_train.data import windows as module
from accel_train.data.windows import SamplesOnDevice, WindowDataset, copy_to_device, split_corpus
from accel_train.tasks.text.builtin import builtin_text
from accel_train.tasks.text.tokenizer import train_tokenizer
from accel_train.tasks.text.tokens import Tokens, write_tokens
from accel_train.tasks.walks.dataset import WalkDataset


def covered(ranges):
    return [token for start, end in ranges for token in range(start, end)]


@given(
    tokens=st.integers(0, 3000),
    context=st.integers(1, 40),
    fraction=st.floats(0.01, 0.9),
    how=st.sampled_from(["tail", "blocks"]),
)
def test_no_token_is_in_both_parts_and_none_is_lost(tokens, context, fraction, how):
    train, val = split_corpus(tokens, context, fraction, how)
    parts = covered(train), covered(val)
    assert sorted(parts[0] + parts[1]) == list(range(tokens))
    assert parts[0] == sorted(parts[0])
    assert parts[1] == sorted(parts[1])


def test_the_tail_is_one_piece_of_the_size_asked_for():
    train, val = split_corpus(1000, 10)
    assert (train.tolist(), val.tolist()) == ([[0, 950]], [[950, 1000]])


@pytest.mark.parametrize("tokens", [2_000, 50_000, 1_000_001])
@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.34, 0.4, 0.6, 0.9])
def test_blocks_hold_out_whole_windows_all_along_the_stream(tokens, fraction):
    context = 16
    _, val = split_corpus(tokens, context, fraction, "blocks")
    lengths = val[:, 1] - val[:, 0]
    assert len(set(lengths)) == 1
    assert (lengths[0] - 1) % context == 0
    assert abs(lengths.sum() / tokens - fraction) < 0.2 * fraction
    # The first and the last tenth have held-out windows too: no stretch of the corpus is left out.
    assert val[0, 0] < tokens / 5
    assert val[-1, 1] > tokens * 4 / 5


@pytest.mark.parametrize("how", ["tail", "blocks"])
def test_the_split_is_deterministic(how):
    for first, second in zip(split_corpus(9999, 7, 0.2, how), split_corpus(9999, 7, 0.2, how), strict=True):
        assert first.tolist() == second.tolist()


@given(
    tokens=st.integers(2, 300),
    context=st.integers(1, 20),
    stride=st.none() | st.integers(1, 30),
    cuts=st.lists(st.integers(0, 300), max_size=4),
)
def test_every_window_is_where_its_number_says(tokens, context, stride, cuts):
    ends = sorted({min(cut, tokens) for cut in cuts} | {tokens})
    ranges = np.array([[0, *ends[:-1]], ends]).T
    step = context if stride is None else stride
    expected = [
        list(range(start, start + context + 1))
        for first, last in ranges.tolist()
        for start in range(first, last - context, step)
    ]
    stream = np.arange(tokens, dtype=np.uint16)
    if not expected:
        with pytest.raises(ValueError, match="hold no window"):
            WindowDataset(stream, context, ranges, stride)
        return
    dataset = WindowDataset(stream, context, ranges, stride)
    assert len(dataset) == len(expected)
    inputs, targets = dataset.__getitems__(np.arange(len(dataset)))
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.tolist() == [window[:-1] for window in expected]
    assert targets.tolist() == [window[1:] for window in expected]


def test_windows_do_not_overlap_and_a_short_last_one_is_dropped():
    dataset = WindowDataset(np.arange(1000, dtype=np.uint16), 256)
    assert len(dataset) == 3
    inputs, targets = dataset[1]
    assert inputs.tolist() == list(range(256, 512))
    assert targets.tolist() == list(range(257, 513))


@pytest.mark.parametrize("index", [3, -1])
def test_a_window_that_is_not_there_is_refused(index):
    with pytest.raises(IndexError, match=r"must lie in \[0, 3\)"):
        WindowDataset(np.arange(1000, dtype=np.uint16), 256)[index]


def test_ranges_outside_the_stream_are_refused():
    with pytest.raises(ValueError, match="the stream has 10 tokens"):
        WindowDataset(np.arange(10), 2, np.array([[0, 11]]))


CPU = torch.device("cpu")


def short_walks() -> WalkDataset:
    # 23 tokens hold three chunks of 7, and two tokens that no sample uses.
    return WalkDataset(np.arange(10 * 23, dtype=np.uint16).reshape(10, 23), 6)


def spread_windows() -> WindowDataset:
    tokens = np.random.default_rng(0).integers(300, size=1000, dtype=np.uint16)
    _, held_out = split_corpus(len(tokens), 8, 0.2, "blocks")
    return WindowDataset(tokens, 8, held_out, stride=3)


def assert_same_on_device(dataset, block: int | None = None) -> None:
    copy = SamplesOnDevice(dataset, CPU)
    assert len(copy) == len(dataset)
    ids = np.random.default_rng(1).permutation(len(dataset))
    for ours, theirs in zip(copy.__getitems__(ids), dataset.__getitems__(ids), strict=True):
        assert ours.dtype == torch.int64
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("make", [short_walks, spread_windows])
@pytest.mark.parametrize("at_once", [7, 23, 64, 1 << 22])
def test_every_sample_on_the_device_is_the_same(make, at_once, monkeypatch):
    monkeypatch.setattr(module, "_TOKENS_AT_ONCE", at_once)
    assert_same_on_device(make())


def test_tokens_of_several_shards_go_to_the_device(tmp_path):
    tokenizer = train_tokenizer("bpe", builtin_text(20_000, 0), 300)
    write_tokens(tmp_path, builtin_text(20_000, 0), tokenizer, "0" * 64, shard_tokens=1000)
    assert_same_on_device(WindowDataset(Tokens(tmp_path), 16))


def test_tokens_on_the_device_may_need_more_than_16_bits():
    tokens = np.array([0, 2**16, 2**31 - 1, 5, 6], dtype=np.uint32)
    assert_same_on_device(WindowDataset(tokens, 2))


@pytest.mark.parametrize("ids", [[-1], [30]])
def test_an_id_outside_is_an_error_on_the_device_too(ids):
    with pytest.raises(IndexError, match="sample ids must lie in"):
        SamplesOnDevice(short_walks(), CPU).__getitems__(np.array(ids))


def test_only_what_fits_on_a_gpu_goes_there(monkeypatch):
    copied = []
    monkeypatch.setattr(module, "SamplesOnDevice", lambda dataset, device: copied.append(dataset) or "copy")
    free = 4 * short_walks().stream_length * 4
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2 * free))
    gpu = torch.device("cuda")
    assert copy_to_device(short_walks(), gpu) == "copy"
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free - 1, 2 * free))
    assert copy_to_device(short_walks(), gpu) is None
    assert copy_to_device(short_walks(), CPU) is None
    assert copy_to_device([1, 2, 3], gpu) is None
    assert len(copied) == 1
