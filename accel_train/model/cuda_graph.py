"""CUDA graphs: work on a device that is recorded once and then started with a single launch.

When the body of ``torch.cuda.graph`` fails, its process cannot go on: the stream is not restored, the graph's pool
stays open, and the generator stays in capture mode, so that the next dropout raises (``CUDAGraph.cpp`` and
``CUDAGeneratorImpl.cpp`` of PyTorch 2.6). Here stream, pool and generator are restored.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch

from accel_train.errors import RunError

_WARM_UP_PASSES = 3
"""Passes before the recording: they load kernels and create workspaces and the state of an optimizer."""

Outputs = TypeVar("Outputs")


def capture(work: Callable[[], Outputs], device: torch.device) -> tuple[Outputs, Callable[[], None]]:
    """Record ``work`` as a CUDA graph.

    Args:
        work: called a few times before it is recorded, the last of them with waiting for the device forbidden.
        device: a CUDA device.

    Returns:
        The outputs of ``work``, whose tensors every replay overwrites, and the function that replays it.

    Raises:
        RuntimeError: ``work`` cannot be recorded, for example because it waits for the device; streams, memory and
            random numbers work as before.
        RunError: they do not, and could not be restored.
    """
    stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    caller = torch.cuda.current_stream(device)
    stream.wait_stream(caller)
    try:
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP_PASSES - 1):
                work()
            # What waits raises here, where nothing is being recorded and nothing has to be restored.
            with _refusing_waits():
                work()
    finally:
        caller.wait_stream(stream)
    outputs, graph = _record(work, stream, device)
    return outputs, graph.replay


@contextmanager
def _refusing_waits() -> Iterator[None]:
    """Make PyTorch raise where the host would wait for the device, in every thread of the process."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _record(work: Callable[[], Outputs], stream: Any, device: torch.device) -> tuple[Outputs, torch.cuda.CUDAGraph]:
    # Nothing else may be freed while recording, and the pool is to get the memory that nobody needs.
    torch.cuda.synchronize(device)
    gc.collect()
    torch.cuda.empty_cache()
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    try:
        with torch.cuda.stream(stream):
            # Only this thread is restricted: the threads that load data and write checkpoints go on.
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                outputs = work()
            except BaseException:
                with suppress(RuntimeError):  # the recording is void; what made it so is raised
                    graph.capture_end()
                raise
            graph.capture_end()
    except BaseException as error:
        _failed.append(graph)
        _restore(device, stream, graph, pool, error)
        raise
    return outputs, graph


_failed: list[torch.cuda.CUDAGraph] = []
"""Graphs whose recording failed. PyTorch still refers to them: its filters of allocations hold a bare pointer."""


def _restore(device: torch.device, stream: Any, graph: torch.cuda.CUDAGraph, pool: Any, failure: BaseException) -> None:
    """Make allocator and generator forget a recording that failed.

    Raises:
        RunError: the process cannot go on.
    """
    # The name of PyTorch 2.6 is the second.
    close: Any = getattr(torch._C, "_cuda_endAllocateToPool", None)
    close = close or getattr(torch._C, "_cuda_endAllocateCurrentStreamToPool")  # noqa: B009 - the stubs are newer
    index = torch.cuda.current_device() if device.index is None else device.index
    with suppress(RuntimeError):  # newer versions close it before they raise
        close(index, pool)
    try:
        graph.pool()
    except RuntimeError:
        # The graph has not come so far as to release its pool when it ends.
        with suppress(RuntimeError):
            torch._C._cuda_releasePool(index, pool)
    try:
        # Only the end of a recording that succeeds takes the generator out of capture mode.
        place, cure = torch.zeros(1, device=device), torch.cuda.CUDAGraph()
        torch.cuda.synchronize(device)
        with torch.cuda.stream(stream):
            cure.capture_begin(capture_error_mode="thread_local")
            place.add_(1.0)
            cure.capture_end()
        cure.reset()
    except RuntimeError as error:
        raise RunError(
            f"a recording as a CUDA graph failed ({failure}) and could not be undone ({error}): "
            "launch it again with training.cuda_graph = false"
        ) from error
