"""Writing to places that are all different, where PyTorch's deterministic algorithms have nothing to gain."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def distinct_places() -> Iterator[None]:
    """Let ``scatter`` and ``index_copy_`` in this context write as if nothing asked for deterministic algorithms.

    These sort the places on a GPU, read one back to check it, and hold a coordinate of 8 bytes for each dimension of
    every value. They guard against places that are written twice; the caller's are all different.
    """
    if not torch.are_deterministic_algorithms_enabled():
        yield
        return
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(True, warn_only=warn_only)
