"""The first part of ``bench_gpu.py``: versions, and the answers of this PyTorch on this device that the code relies on.

Every probe is small, catches what it raises, and says what it found: a probe that fails ends no other.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from bench_machine import machine
from torch import Tensor
from torch.nn import functional

from accel_train.model.cuda_graph import capture
from accel_train.model.kernels.cross_entropy import linear_cross_entropy
from accel_train.ranks.accelerator import repeats_memory_efficient_attention

# Read by cuBLAS at the first matrix product of a process, as the trainer sets it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device() -> dict[str, Any]:
    """What the device is."""
    if DEVICE.type != "cuda":
        return {"device": "cpu"}
    properties = torch.cuda.get_device_properties(DEVICE)
    return {
        "device": properties.name,
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
    }


def _version(package: str) -> str | None:
    try:
        return str(__import__(package).__version__)
    except ImportError:
        return None


def driver() -> str:
    """What nvidia-smi says of the card, its driver and its clocks."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "no nvidia-smi"
    fields = "name,driver_version,memory.total,clocks.sm,clocks.max.sm,power.limit"
    line = [tool, f"--query-gpu={fields}", "--format=csv,noheader"]
    done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=10)
    return (done.stdout or done.stderr).strip()


def launch_microseconds() -> float:
    """What the host needs to start one small kernel."""
    x = torch.zeros(64, device=DEVICE)
    _wait()
    began = time.perf_counter()
    for _ in range(2000):
        x.add_(1.0)
    _wait()
    return 1e6 * (time.perf_counter() - began) / 2000


def memory_efficient_attention() -> str:
    """Whether attention in float32 may use the memory-efficient kernel."""
    if DEVICE.type != "cuda":
        return "no device"
    torch.use_deterministic_algorithms(True)
    try:
        return "deterministic" if repeats_memory_efficient_attention(DEVICE) else "not deterministic: math is used"
    finally:
        torch.use_deterministic_algorithms(False)


def waits_of_scatter_add() -> str:
    """Whether ``scatter_add_`` under deterministic algorithms waits for the device."""
    table, ones = torch.zeros(8, 50, device=DEVICE), torch.ones(8, 1, device=DEVICE)
    return _waiting(lambda: table.scatter_add_(1, _index(8), ones))


def waits_of_the_fused_loss() -> str:
    """Whether the loss that both tasks train with waits for the device."""

    def work() -> None:
        x = torch.randn(8, 16, device=DEVICE, requires_grad=True)
        weight = torch.randn(50, 16, device=DEVICE, requires_grad=True)
        linear_cross_entropy(x, weight, _index(8).squeeze(1)).backward()  # type: ignore[no-untyped-call]

    return _waiting(work)


def _index(rows: int) -> Tensor:
    return torch.arange(rows, device=DEVICE).unsqueeze(1)


def _waiting(work: Callable[[], object]) -> str:
    if DEVICE.type != "cuda":
        return "no device"
    work()
    _wait()
    torch.use_deterministic_algorithms(True)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        work()
    except RuntimeError as error:
        first = str(error).splitlines()[0]
        return f"waits: {first}" if "synchronizing" in first else f"raises: {first}"
    finally:
        torch.cuda.set_sync_debug_mode(before)
        torch.use_deterministic_algorithms(False)
    return "does not wait"


def after_a_failed_recording() -> str:
    """Whether dropout and a second recording work after one that failed."""
    if DEVICE.type != "cuda":
        return "no device"
    x = torch.ones(64, device=DEVICE)
    outcome = []

    def dropped() -> Tensor:
        return functional.dropout(x, 0.5)

    def waits_while_recording() -> Tensor:
        if torch.cuda.is_current_stream_capturing():
            x.sum().item()
        return dropped()

    try:
        capture(waits_while_recording, DEVICE)
        outcome.append("a recording that waits did not fail")
    except RuntimeError as error:
        outcome.append(f"failed as it should ({str(error).splitlines()[0]})")
    dropped()
    outputs, play_back = capture(dropped, DEVICE)
    play_back()
    outcome.append(f"a second one drops {float((outputs == 0).float().mean()):.2f} of 0.5")
    return "; ".join(outcome)


def _wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


PROBES: Mapping[str, Callable[[], Any]] = {
    "device": device,
    "driver": driver,
    "launch_microseconds": launch_microseconds,
    "memory_efficient_attention": memory_efficient_attention,
    "scatter_add": waits_of_scatter_add,
    "fused_loss": waits_of_the_fused_loss,
    "after_a_failed_recording": after_a_failed_recording,
}


def main() -> None:
    figures: dict[str, Any] = {"machine": machine()}
    print(json.dumps(figures["machine"], indent=1))
    for name, probe in PROBES.items():
        try:
            figures[name] = probe()
        except Exception as error:  # whatever it is, it is an answer
            figures[name] = f"{type(error).__name__}: {error}"
        print(f"{name}: {figures[name]}")
        Path(sys.argv[1]).write_text(json.dumps(figures), encoding="utf-8")


if __name__ == "__main__":
    main()
