"""What callbacks see, and which of them are called."""

import math

import pytest
import torch

from accel_train.training.callbacks import Callback, LoopState, overriding


def test_loss_and_norm_are_nan_before_the_first_step():
    state = LoopState()
    assert math.isnan(state.loss)
    assert math.isnan(state.grad_norm)


def test_loss_and_norm_are_those_observed_last():
    state = LoopState()
    state.observe(torch.tensor(2.0), torch.tensor(0.5))
    state.observe(torch.tensor(1.5), torch.tensor(0.25))
    assert (state.loss, state.grad_norm) == (1.5, 0.25)


def test_a_norm_that_was_not_measured_is_nan():
    state = LoopState()
    state.observe(torch.tensor(2.0), None)
    assert math.isnan(state.grad_norm)


@pytest.mark.parametrize(("step", "skipped", "update"), [(0, 0, 0), (1, 0, 0), (5, 0, 4), (5, 2, 2)])
def test_lr_is_that_of_the_last_update_made(step, skipped, update):
    """The schedule stands still in steps that loss scaling left out."""
    state = LoopState(step=step, skipped_steps=skipped, schedule=lambda number: number / 10)
    assert state.lr == update / 10


def test_only_methods_that_are_overridden_are_called():
    class Counts(Callback):
        def on_step_end(self, state):
            pass

    counts, idle = Counts(), Callback()
    assert overriding([counts, idle], "on_step_end") == [counts.on_step_end]
    assert overriding([counts, idle], "on_log") == []
