"""Losses and fingerprint between two settlements."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from accel_train.data.permutation import fingerprint_terms
from accel_train.training.loss_buffer import LossBuffer

CPU = torch.device("cpu")


def as_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def test_a_step_is_the_mean_of_its_micro_steps():
    buffer = LossBuffer(8, 2, 1, as_is, CPU)
    for position, loss in enumerate([1.0, 3.0, 5.0, 6.0]):
        buffer.add(torch.tensor(loss), np.array([position]), np.array([position]))
    losses, _ = buffer.collect()
    assert losses == [2.0, 5.5]
    assert buffer.collect() == ([], 0)


def test_the_losses_of_all_ranks_count_alike():
    others = torch.tensor([10.0, 20.0])

    def gather(tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat([tensor, others]) if tensor.is_floating_point() else torch.cat([tensor, tensor])

    buffer = LossBuffer(4, 1, 2, gather, CPU)
    for loss in (2.0, 4.0):
        buffer.add(torch.tensor(loss), np.array([0]), np.array([0]))
    losses, fingerprint = buffer.collect()
    assert losses == [6.0, 12.0]
    assert fingerprint == 4 * fingerprint_terms(np.array([0]), np.array([0])) % 2**64


@given(cut=st.integers(0, 12))
def test_when_it_is_settled_changes_nothing(cut):
    generator = np.random.default_rng(0)
    losses = generator.random(12).astype(np.float32)

    def settle_at(cuts):
        buffer, found, fingerprint = LossBuffer(12, 1, 1, as_is, CPU), [], 0
        for step, loss in enumerate(losses):
            buffer.add(torch.tensor(loss), np.array([step]), np.array([step * 7]))
            if step + 1 in cuts or step == 11:
                some, part = buffer.collect()
                found, fingerprint = found + some, (fingerprint + part) % 2**64
        return found, fingerprint

    assert settle_at({cut}) == settle_at(set())
