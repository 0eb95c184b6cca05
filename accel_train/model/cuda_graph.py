"""CUDA graphs: work on a device that is recorded once and then started with a single launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

_WARM_UP_PASSES = 3
"""Passes before the recording: they load kernels and create workspaces and the state of an optimizer."""

Outputs = TypeVar("Outputs")


def capture(work: Callable[[], Outputs], device: torch.device) -> tuple[Outputs, Callable[[], None]]:
    """Record ``work`` as a CUDA graph.

    Args:
        work: called a few times before it is recorded.
        device: a CUDA device.

    Returns:
        The outputs of ``work``, whose tensors every replay overwrites, and the function that replays it.

    Raises:
        RuntimeError: ``work`` cannot be recorded, for example because it waits for the device.
    """
    side_stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    main_stream = torch.cuda.current_stream(device)
    side_stream.wait_stream(main_stream)
    with torch.cuda.stream(side_stream):
        for _ in range(_WARM_UP_PASSES):
            work()
    main_stream.wait_stream(side_stream)
    graph = torch.cuda.CUDAGraph()
    # Only this thread is restricted: the threads that load data and write checkpoints go on.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        outputs = work()
    return outputs, graph.replay
