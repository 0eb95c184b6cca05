"""The Accelerator as this trainer needs it, and what decides the bits on this machine.

Device, number of processes, precision, compilation and sharding are Accelerate's choice
alone; here they are only checked, completed (timeouts, batch splitting) and described.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration, tracking, utils
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from accel_train.config.sections import TrainingConfig
from accel_train.errors import ConfigError

_MAX_WARM_UP_PASSES = 5
_WATCHDOG_SECONDS = 120.0
_REPEATS = 4
"""Gradients that are compared to find out whether attention is deterministic."""


def build_accelerator(
    config: TrainingConfig, *, log_with: Sequence[str] = (), log_dir: str | None = None
) -> Accelerator:
    """Return an Accelerator with the configured timeout and accumulation that splits batches among the ranks.

    Raises:
        ConfigError: the launched processes did not find each other, or cannot share a batch.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    config.check_world_size(world_size)
    available = {str(tracker.value) for tracker in tracking.get_available_trackers()} if log_with else set()
    for tracker in log_with:
        if tracker not in available:
            # Accelerate would leave it out without a word.
            raise ConfigError("tracking.log_with", tracker, "is not installed; pip install accel_train[tracking]")
    if config.deterministic:
        # Read by cuBLAS when CUDA starts, so it must stand before the Accelerator does.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    accelerator = Accelerator(
        dataloader_config=DataLoaderConfiguration(split_batches=True, use_seedable_sampler=False, non_blocking=True),
        gradient_accumulation_plugin=utils.GradientAccumulationPlugin(
            num_steps=config.gradient_accumulation_steps, adjust_scheduler=False, sync_with_dataloader=False
        ),
        kwargs_handlers=[utils.InitProcessGroupKwargs(timeout=_group_timeout(config))],
        log_with=list(log_with) or None,
        project_config=utils.ProjectConfiguration(logging_dir=log_dir),
        rng_types=[],
    )
    if accelerator.num_processes != world_size:
        rule = f"processes were launched but each sees {accelerator.num_processes}: they did not find each other"
        cure = "on CPU set ACCELERATE_USE_CPU=true and launch with --multi_gpu --num_processes N"
        raise ConfigError("WORLD_SIZE", world_size, f"{rule}; {cure}")
    if config.deterministic and accelerator.device.type == "cuda":
        _make_deterministic(accelerator.device)
    return accelerator


def _group_timeout(config: TrainingConfig) -> timedelta:
    """Return how long a collective may take; under NCCL longer than this trainer waits before it says who is gone.

    NCCL's watchdog aborts the process, and says nothing of ranks.
    """
    on_gpu = torch.cuda.is_available() and not utils.str_to_bool(os.environ.get("ACCELERATE_USE_CPU", "false"))
    return timedelta(seconds=config.timeout_seconds + (_WATCHDOG_SECONDS if on_gpu else 0.0))


def check_accelerator(accelerator: Accelerator, config: TrainingConfig) -> None:
    """Refuse an Accelerator that does not split batches or count micro-steps as the loop does.

    Raises:
        ConfigError: it was not built by :func:`build_accelerator`.
    """
    if accelerator.num_processes > 1 and not accelerator.split_batches:
        raise ConfigError("accelerator", "split_batches=False", "must split batches; use build_accelerator")
    steps = accelerator.gradient_accumulation_steps
    if steps != config.gradient_accumulation_steps:
        rule = f"does not agree with the Accelerator's {steps}; use build_accelerator"
        raise ConfigError("training.gradient_accumulation_steps", config.gradient_accumulation_steps, rule)


def _make_deterministic(device: torch.device) -> None:
    torch.use_deterministic_algorithms(True)
    # Filling every fresh tensor costs launches and changes no result of a correct program.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
    # The choice among these depends on types and shapes alone: two runs of one configuration make the same.
    torch.backends.cuda.enable_flash_sdp(True)
    torch.backends.cuda.enable_math_sdp(True)
    torch.backends.cuda.enable_mem_efficient_sdp(repeats_memory_efficient_attention(device))
    torch.backends.cuda.enable_cudnn_sdp(False)


def repeats_memory_efficient_attention(device: torch.device) -> bool:
    """Return whether PyTorch's memory-efficient attention computes the same gradients every time on ``device``.

    Flash attention takes no float32, and the plain products hold all weights, whose number grows with the square of
    the context. With deterministic algorithms, which must be on, PyTorch splits no keys (``attention_backward.cu``),
    and then every sum has one order; where a version or a device does otherwise, this finds out.
    """
    generator = torch.Generator(device).manual_seed(0)
    # Several blocks of keys, and enough heads to fill a GPU.
    shape = 4, 32, 640, 32
    query, key, value = (torch.randn(shape, generator=generator, device=device, requires_grad=True) for _ in range(3))
    found = []
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        for _ in range(_REPEATS):
            try:
                mixed = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
                found.append(torch.autograd.grad(mixed.square().sum(), [query, key, value]))
            except RuntimeError:  # there is no such kernel for this device, or none that is deterministic
                return False
    return all(torch.equal(a, b) for later in found[1:] for a, b in zip(found[0], later, strict=True))


def arithmetic(accelerator: Accelerator) -> dict[str, str]:
    """Return precision, compilation and sharding; a checkpoint made with others is refused."""
    dynamo = getattr(accelerator.state, "dynamo_plugin", None)
    return {
        "mixed_precision": str(accelerator.mixed_precision),
        "compilation": str(getattr(getattr(dynamo, "backend", None), "value", "NO")).lower(),
        "sharding": "fsdp" if getattr(accelerator.state, "fsdp_plugin", None) is not None else "none",
    }


def machine(accelerator: Accelerator) -> dict[str, Any]:
    """Return what else decides the bits; it is recorded, and a change between two launches is a warning."""
    device = accelerator.device
    of_a_gpu = {"float32_attention": _float32_attention()} if device.type == "cuda" else {}
    return {
        **of_a_gpu,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "device_type": device.type,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "num_processes": accelerator.num_processes,
    }


def _float32_attention() -> str:
    enabled = torch.backends.cuda.mem_efficient_sdp_enabled()  # type: ignore[no-untyped-call]
    return "memory-efficient" if enabled else "math"


def warm_up_buckets(model: nn.Module, backward: Callable[[], None]) -> None:
    """Call ``backward`` until DDP has rebuilt its buckets, and restore the model's buffers.

    The first backward of a process sums gradients in another order than all later ones. Called before training,
    this makes fresh and resumed runs alike sum as a later one does.
    """
    saved = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    model.train()
    for done in range(_MAX_WARM_UP_PASSES):
        backward()
        if done >= 1 and _buckets_are_rebuilt(model):
            break
    for buffer, content in saved:
        buffer.copy_(content)


def _buckets_are_rebuilt(model: nn.Module) -> bool:
    if not isinstance(model, nn.parallel.DistributedDataParallel):
        return True
    return bool(model._get_ddp_logging_data().get("has_rebuilt_buckets", True))  # type: ignore[no-untyped-call]
