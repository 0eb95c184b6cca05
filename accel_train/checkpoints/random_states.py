"""The random states of a process: their digest, seeds for new ranks, and code that must leave them alone."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

_DEVICE_STATE = "random_states_{}.safetensors"
"""Of a rank; beside Accelerate's ``random_states_0.pkl``."""


def rng_digest(device: torch.device) -> str:
    """Return the SHA-256 (hex) of the random states that this process draws from: Python, NumPy, torch, its GPU.

    Those of other visible GPUs are left out: their number may differ from launch to launch.
    """
    digest = hashlib.sha256(repr(random.getstate()).encode())
    name, keys, *rest = np.random.get_state()  # noqa: NPY002 - the global state is what is saved
    digest.update(repr((name, rest)).encode() + np.asarray(keys).tobytes())
    digest.update(torch.get_rng_state().numpy().tobytes())
    if device.type == "cuda":
        digest.update(torch.cuda.get_rng_state(device).numpy().tobytes())
    return digest.hexdigest()


def save_device_state(directory: Path, rank: int, device: torch.device) -> None:
    """Write the random state of this rank's GPU; nothing on a CPU.

    Accelerate saves those of all visible GPUs by their index and restores them so. Where the same ranks are spread
    over the machines in another way, a rank has a GPU of another index.
    """
    if device.type == "cuda":
        save_file({"state": torch.cuda.get_rng_state(device)}, directory / _DEVICE_STATE.format(rank))


def load_device_state(directory: Path, rank: int, device: torch.device) -> None:
    """Set this rank's GPU to the random state that :func:`save_device_state` wrote, if it wrote one."""
    path = directory / _DEVICE_STATE.format(rank)
    if device.type == "cuda" and path.exists():
        torch.cuda.set_rng_state(load_file(path)["state"], device)


def derive_rank_seed(seed: int, step: int, rank: int) -> int:
    """Return a seed (32 bits) for a rank without a saved random state, new after a change of world size."""
    digest = hashlib.sha256(f"{seed}/{step}/{rank}".encode()).digest()
    return int.from_bytes(digest[:4], "little")


@contextmanager
def preserved_random_state(device: torch.device) -> Iterator[None]:
    """Leave the global random states (Python, NumPy, torch, the GPU ``device``) as the block found them."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - the global state is meant
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002
