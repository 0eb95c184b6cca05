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
from accelerate import Accelerator, DataLoaderConfiguration, utils
from accelerate.tracking import get_available_trackers
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from accel_train.config.sections import TrainingConfig
from accel_train.errors import ConfigError

_MAX_WARM_UP_PASSES = 5


def build_accelerator(
    config: TrainingConfig, *, log_with: Sequence[str] = (), log_dir: str | None = None
) -> Accelerator:
    """Return an Accelerator with the configured timeout and accumulation that splits batches among the ranks.

    Raises:
        ConfigError: the launched processes did not find each other, or cannot share a batch.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    config.check_world_size(world_size)
    available = {str(tracker.value) for tracker in get_available_trackers()} if log_with else set()
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
        kwargs_handlers=[utils.InitProcessGroupKwargs(timeout=timedelta(seconds=config.timeout_seconds))],
        log_with=list(log_with) or None,
        project_config=utils.ProjectConfiguration(logging_dir=log_dir),
        rng_types=[],
    )
    if accelerator.num_processes != world_size:
        rule = (
            f"processes were launched but each sees {accelerator.num_processes}: they did not find each other; "
            "on CPU set ACCELERATE_USE_CPU=true and launch with --multi_gpu --num_processes N"
        )
        raise ConfigError("WORLD_SIZE", world_size, rule)
    if config.deterministic and accelerator.device.type == "cuda":
        _make_deterministic()
    return accelerator


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


def _make_deterministic() -> None:
    torch.use_deterministic_algorithms(True)
    # Filling every fresh tensor costs launches and changes no result of a correct program.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
    # One attention backend whatever the shapes: the choice must not differ between two runs.
    torch.backends.cuda.enable_flash_sdp(True)
    torch.backends.cuda.enable_math_sdp(True)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)


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
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "device_type": device.type,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "num_processes": accelerator.num_processes,
    }


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
    if not isinstance(model, DistributedDataParallel):
        return True
    return bool(model._get_ddp_logging_data().get("has_rebuilt_buckets", True))  # type: ignore[no-untyped-call]
