"""Work on a CUDA device as one graph: recorded once, then started with a single launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

_WARM_UP_PASSES = 3
"""Before a recording, outside of it: lazy kernels, workspaces and an optimizer's state come to be."""

Outputs = TypeVar("Outputs")


def capture(work: Callable[[], Outputs], device: torch.device) -> tuple[Outputs, Callable[[], None]]:
    """Record ``work`` as a CUDA graph; returns where its results will be, and what runs it.

    Args:
        work: is called a few times before it is recorded.
        device: a CUDA device.

    Raises:
        RuntimeError: ``work`` asks the device something or does what else cannot be recorded.
    """
    aside: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    here = torch.cuda.current_stream(device)
    aside.wait_stream(here)
    with torch.cuda.stream(aside):
        for _ in range(_WARM_UP_PASSES):
            work()
    here.wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    # Watched in this thread alone: those that load data and write checkpoints may go on meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        outputs = work()
    return outputs, graph.replay
