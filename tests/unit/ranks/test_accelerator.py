"""The Accelerator as the loop needs it, and what is said about it."""

from __future__ import annotations

import random
from functools import partial

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn

from accel_train.config.sections import TrainingConfig
from accel_train.errors import ConfigError
from accel_train.ranks import accelerator as module
from accel_train.ranks.accelerator import arithmetic, build_accelerator, check_accelerator, machine, warm_up_buckets

CONFIG = TrainingConfig(batch_size=8, gradient_accumulation_steps=2)


def test_it_splits_batches_and_accumulates_as_configured():
    accelerator = build_accelerator(CONFIG)
    assert accelerator.split_batches
    assert accelerator.gradient_accumulation_steps == 2
    check_accelerator(accelerator, CONFIG)


def test_building_it_draws_no_random_number():
    torch.manual_seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    build_accelerator(CONFIG)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before[1:]


def test_processes_that_did_not_find_each_other_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"WORLD_SIZE: 2 processes were launched but each sees 1"):
        build_accelerator(TrainingConfig(batch_size=8))


def test_a_batch_that_the_processes_cannot_share_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match=r"training\.batch_size: 8 .*multiple of 3"):
        build_accelerator(TrainingConfig(batch_size=8))


def test_a_tracker_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setattr(module.tracking, "get_available_trackers", list)
    with pytest.raises(ConfigError, match=r"tracking\.log_with: 'wandb' is not installed"):
        build_accelerator(CONFIG, log_with=["wandb"])


@pytest.mark.parametrize("steps", [1, 4])
def test_another_accumulation_is_refused(steps):
    accelerator = Accelerator(gradient_accumulation_steps=steps)
    with pytest.raises(ConfigError, match=f"does not agree with the Accelerator's {steps}"):
        check_accelerator(accelerator, CONFIG)


def test_whole_batches_for_every_rank_are_refused(monkeypatch):
    accelerator = Accelerator(gradient_accumulation_steps=2)
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    with pytest.raises(ConfigError, match="must split batches"):
        check_accelerator(accelerator, CONFIG)


def test_arithmetic_names_precision_compilation_and_sharding():
    expected = {"mixed_precision": "no", "compilation": "no", "sharding": "none"}
    assert arithmetic(build_accelerator(CONFIG)) == expected


def test_machine_names_what_else_decides_the_bits():
    found = machine(build_accelerator(CONFIG))
    assert (found["device"], found["device_type"], found["num_processes"]) == ("cpu", "cpu", 1)
    assert (found["threads"], found["torch"]) == (torch.get_num_threads(), torch.__version__)


def test_warming_up_leaves_buffers_as_they_were():
    model = nn.BatchNorm1d(3)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    passes = []

    def backward() -> None:
        passes.append(model.training)
        model(torch.rand(4, 3)).sum().backward()

    model.eval()
    warm_up_buckets(model, backward)
    assert passes == [True, True], "the second pass of a process sums as all later ones do"
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


@pytest.mark.parametrize(
    ("has_gpu", "uses_cpu", "seconds"), [(True, None, 150.0), (True, "true", 30.0), (False, None, 30.0)]
)
def test_the_watchdog_of_nccl_comes_after_the_trainer(has_gpu, uses_cpu, seconds, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    if uses_cpu is not None:
        monkeypatch.setenv("ACCELERATE_USE_CPU", uses_cpu)
    assert module._group_timeout(TrainingConfig(timeout_seconds=30.0)).total_seconds() == seconds


def test_a_device_without_the_memory_efficient_kernel_takes_the_plain_products():
    assert not module.repeats_memory_efficient_attention(torch.device("cpu"))


@pytest.mark.parametrize("differs", [False, True])
def test_the_memory_efficient_kernel_is_taken_where_its_gradients_repeat(differs, monkeypatch):
    """With a stand-in for the kernel, whose last gradients may differ in one bit."""
    calls = []

    def attention(query, key, value, is_causal):
        calls.append(1)
        noise = 1e-3 if differs and len(calls) == module._REPEATS else 0.0
        return (query * key * value) * (1 + noise)

    monkeypatch.setattr(module.nn.functional, "scaled_dot_product_attention", attention)
    assert module.repeats_memory_efficient_attention(torch.device("cpu")) is not differs
    assert len(calls) == module._REPEATS


@pytest.mark.parametrize("repeats", [False, True])
def test_float32_attention_follows_what_was_found_and_is_recorded(repeats, monkeypatch):
    enabled = {}
    for kind in ("flash", "math", "mem_efficient", "cudnn"):
        monkeypatch.setattr(torch.backends.cuda, f"enable_{kind}_sdp", partial(enabled.__setitem__, kind))
    monkeypatch.setattr(torch.backends.cuda, "mem_efficient_sdp_enabled", lambda: enabled["mem_efficient"])
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda _: None)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.setattr(module, "repeats_memory_efficient_attention", lambda _: repeats)
    module._make_deterministic(torch.device("cuda"))
    assert enabled == {"flash": True, "math": True, "mem_efficient": repeats, "cudnn": False}
    assert module._float32_attention() == ("memory-efficient" if repeats else "math")
