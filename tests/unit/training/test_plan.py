"""The arithmetic of a run."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from accel_train.config.sections import TrainingConfig
from accel_train.errors import ConfigError
from accel_train.training.plan import Plan, cosine_with_warmup, warmup_steps


def plan(samples=100, world=1, rank=0, **config) -> Plan:
    return Plan(TrainingConfig(**{"batch_size": 8, "max_epochs": 3, **config}), samples, world, rank, seed=1)


def test_an_epoch_is_whole_batches_and_the_earlier_budget_ends_the_run():
    assert plan().steps_per_epoch == 12
    assert plan().total_steps == 36
    assert plan(max_steps=20).total_steps == 20
    assert plan(max_steps=99).total_steps == 36


@given(world=st.sampled_from([1, 2, 4]), accumulation=st.sampled_from([1, 2]))
def test_the_slices_of_the_ranks_make_up_the_micro_batch(world, accumulation):
    config = {"gradient_accumulation_steps": accumulation}
    slices = [plan(world=world, rank=rank, **config).own_positions() for rank in range(world)]
    assert np.concatenate(slices).tolist() == list(range(8 // accumulation))


def test_the_sampler_ends_with_the_last_whole_step_under_accumulation():
    """100 samples, batches of 64 in micro-batches of 32: a third micro-batch must not leak into the next epoch."""
    few = plan(batch_size=64, gradient_accumulation_steps=2)
    assert few.steps_per_epoch == 1
    assert len(list(few.sampler())) == 2


def test_positions_count_through_the_whole_run():
    assert plan().first_position(0, 3) == 24
    assert plan().first_position(2, 1) == 2 * 12 * 8 + 8


def test_the_learning_rate_warms_up_and_decays_to_the_ratio():
    p = plan(learning_rate=0.5, warmup_steps=4, min_lr_ratio=0.2)
    rates = [p.learning_rate(step) for step in range(36)]
    assert rates[:4] == pytest.approx([0.125, 0.25, 0.375, 0.5])
    assert rates[-1] == pytest.approx(0.1, rel=0.05)
    assert all(a >= b for a, b in itertools.pairwise(rates[3:]))


@pytest.mark.parametrize("world", [3, 5])
def test_a_batch_that_cannot_be_split_is_refused_with_the_multiple(world):
    with pytest.raises(ConfigError, match=rf"training\.batch_size: 8 .*choose a multiple of {world}"):
        plan(world=world)


def test_the_first_step_learns_and_the_last_of_the_warmup_is_at_the_peak():
    assert [cosine_with_warmup(step, 4, 100) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_the_last_step_is_at_the_minimum_and_it_stays_there():
    assert [cosine_with_warmup(step, 10, 100, 0.1) for step in (99, 100, 10_000)] == pytest.approx([0.1] * 3)
    assert cosine_with_warmup(98, 10, 100, 0.1) > 0.1


def test_half_way_down_it_is_in_the_middle():
    assert cosine_with_warmup(50, 0, 101, 0.1) == pytest.approx(0.55)
    assert cosine_with_warmup(25, 0, 101, 0.0) == pytest.approx(0.5 + 0.5 * math.cos(math.pi / 4))


def test_without_warmup_it_starts_at_the_peak():
    assert cosine_with_warmup(0, 0, 100) == 1.0


@given(warmup=st.integers(0, 50), total=st.integers(1, 200), minimum=st.floats(0, 1))
def test_rises_to_the_peak_then_falls_to_the_minimum(warmup, total, minimum):
    factors = [cosine_with_warmup(step, warmup, total, minimum) for step in range(max(warmup, total) + 5)]
    peak = warmup
    assert factors[peak] == factors[max(peak - 1, 0)] == 1.0 or warmup == 0
    assert factors[: peak + 1] == sorted(factors[: peak + 1])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)
    assert min(factors[peak:]) >= minimum - 1e-12
    assert factors[-1] == pytest.approx(minimum)


def test_drives_a_torch_scheduler():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine_with_warmup(step, 2, 4))
    used = []
    for _ in range(4):
        used.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert used == pytest.approx([1.0, 2.0, 2.0, 0.2])


def test_warmup_is_a_part_of_the_run_unless_steps_are_set():
    assert warmup_steps(TrainingConfig(warmup_ratio=0.1), 1234) == 123
    assert warmup_steps(TrainingConfig(warmup_ratio=0.1, warmup_steps=7), 1234) == 7
    assert warmup_steps(TrainingConfig(warmup_ratio=0.1, warmup_steps=0), 1234) == 0
