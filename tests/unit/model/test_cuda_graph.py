"""What a recording does to a process, on a CPU: the calls that it makes to stand-ins for CUDA."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from accel_train.errors import RunError
from accel_train.model import cuda_graph
from accel_train.model.cuda_graph import capture

DEVICE = torch.device("cuda", 0)


class Device:
    """Stands in for CUDA: a stream, a pool and a generator, with the habits of PyTorch 2.6 when a recording fails."""

    def __init__(self):
        self.stream, self.mode = "main", "default"
        self.recording = self.generator_is_recording = False
        self.open_pools, self.pools_made, self.recordings = set(), 0, 0
        self.void = self.never_again = False
        self.closes_first = False
        """As from PyTorch 2.12 on."""
        self.released = []

    @contextmanager
    def on(self, stream):
        before, self.stream = self.stream, stream.name
        try:
            yield
        finally:
            self.stream = before

    def new_pool(self):
        self.pools_made += 1
        return (0, self.pools_made)

    def close(self, index, pool):
        if pool not in self.open_pools:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.open_pools.remove(pool)

    def dropout(self):
        if self.generator_is_recording and not self.recording:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")

    def wait(self):
        """What ``.item()`` does."""
        if self.recording:
            self.void = True
            raise RuntimeError("operation not permitted when stream is capturing")
        if self.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")


class Graph:
    def __init__(self, device):
        self._device, self._pool, self._ended = device, None, False

    def pool(self):
        if not self._ended:
            raise RuntimeError("Called CUDAGraph::pool() without a preceding successful capture.")
        return self._pool

    def capture_begin(self, pool=None, capture_error_mode="global"):
        device = self._device
        assert device.stream == "side"
        assert capture_error_mode == "thread_local"
        if device.never_again:
            raise RuntimeError("CUDA error: unspecified launch failure")
        self._pool = pool or device.new_pool()
        device.open_pools.add(self._pool)
        device.recording = device.generator_is_recording = True
        device.recordings += 1

    def capture_end(self):
        device = self._device
        device.recording = False
        if device.void:
            device.void = False
            if device.closes_first:
                device.open_pools.remove(self._pool)
            raise RuntimeError("operation failed due to a previous error during capture")
        device.open_pools.remove(self._pool)
        device.generator_is_recording = False
        self._ended = True

    def replay(self):
        self._device.replayed = True

    def reset(self):
        pass


@pytest.fixture
def device(monkeypatch):
    found = Device()
    ignored = lambda *_: None  # noqa: E731
    fakes = {
        "Stream": lambda _: SimpleNamespace(name="side", wait_stream=ignored),
        "current_stream": lambda _: SimpleNamespace(name="main", wait_stream=ignored),
        "stream": found.on,
        "CUDAGraph": lambda: Graph(found),
        "graph_pool_handle": found.new_pool,
        "synchronize": ignored,
        "empty_cache": ignored,
        "get_sync_debug_mode": lambda: found.mode,
        "set_sync_debug_mode": lambda mode: setattr(found, "mode", mode),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", found.close, raising=False)
    release = lambda index, pool: found.released.append(pool)  # noqa: E731
    monkeypatch.setattr(torch._C, "_cuda_releasePool", release, raising=False)
    monkeypatch.setattr(cuda_graph, "_failed", [])
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: torch.ones(1))
    return found


def is_clean(device):
    device.dropout()
    return (device.stream, device.mode, device.open_pools, device.recording) == ("main", "default", set(), False)


def test_what_can_be_recorded_is_and_leaves_the_process_as_it_was(device):
    passes = []
    outputs, replay = capture(lambda: passes.append(device.recording) or "outputs", DEVICE)
    assert outputs == "outputs"
    assert passes == [False, False, False, True]
    assert is_clean(device)
    replay()
    assert device.replayed


def test_work_that_always_waits_fails_before_the_recording(device):
    with pytest.raises(RuntimeError, match="called a synchronizing CUDA operation"):
        capture(device.wait, DEVICE)
    assert device.recordings == 0
    assert is_clean(device)


@pytest.mark.parametrize("closes_first", [False, True])
def test_a_failed_recording_is_undone(device, closes_first):
    """The error is the one that made the recording void, not the one of its end; a second recording succeeds.

    Its pool is released once, and the graph, to which PyTorch still refers, is kept.
    """
    device.closes_first = closes_first

    def work():
        device.dropout()
        if device.recording:
            device.wait()

    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        capture(work, DEVICE)
    assert is_clean(device)
    assert len(device.released) == len(cuda_graph._failed) == 1
    assert capture(device.dropout, DEVICE)
    assert is_clean(device)
    assert len(device.released) == 1


def test_an_error_of_python_while_recording_is_undone_as_well(device):
    def work():
        if device.recording:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        capture(work, DEVICE)
    assert is_clean(device)
    assert not device.released, "the graph, whose recording ended, does that itself"


def test_the_older_name_of_pytorch_2_6_closes_the_pool(device, monkeypatch):
    monkeypatch.delattr(torch._C, "_cuda_endAllocateToPool")
    monkeypatch.setattr(torch._C, "_cuda_endAllocateCurrentStreamToPool", device.close, raising=False)
    with pytest.raises(RuntimeError, match="not permitted"):
        capture(lambda: device.wait() if device.recording else None, DEVICE)
    assert is_clean(device)


def test_what_cannot_be_undone_ends_the_run(device):
    def work():
        if device.recording:
            device.never_again = True
            device.wait()

    with pytest.raises(RunError, match=r"could not be undone .*launch failure.*cuda_graph = false"):
        capture(work, DEVICE)
