"""Random states: what their digest sees, seeds of new ranks, and blocks that leave them alone."""

import random

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from accel_train.checkpoints.random_states import (
    derive_rank_seed,
    load_device_state,
    preserved_random_state,
    rng_digest,
    save_device_state,
)

CPU = torch.device("cpu")
DRAWS = {"python": random.random, "numpy": np.random.rand, "torch": lambda: torch.rand(1)}
counts = st.tuples(st.integers(0, 2**31), st.integers(0, 10**6), st.integers(0, 4096))


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS.keys())
def test_digest_sees_every_generator(draw):
    before = rng_digest(CPU)
    assert rng_digest(CPU) == before
    draw()
    assert rng_digest(CPU) != before


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS.keys())
def test_preserved_block_leaves_no_trace(draw):
    before = rng_digest(CPU)
    with preserved_random_state(CPU):
        draw()
        assert rng_digest(CPU) != before, "the block really drew"
    assert rng_digest(CPU) == before


def test_preserved_block_that_raises_leaves_no_trace():
    def draw_and_fail():
        for draw in DRAWS.values():
            draw()
        raise ZeroDivisionError

    before = rng_digest(CPU)
    with pytest.raises(ZeroDivisionError), preserved_random_state(CPU):
        draw_and_fail()
    assert rng_digest(CPU) == before


@given(counts, counts)
def test_rank_seeds_of_other_arguments_differ(first, second):
    """In 32 bits two may be equal; hypothesis draws far too few to meet such a pair."""
    assume(first != second)
    assert derive_rank_seed(*first) != derive_rank_seed(*second)


@given(counts)
def test_rank_seed_fits_every_generator(arguments):
    assert 0 <= derive_rank_seed(*arguments) < 2**32


def test_rank_seed_is_that_of_earlier_versions():
    """A run that is resumed by another version must derive the same random state."""
    assert derive_rank_seed(42, 3, 1) == 289819799


class Devices:
    """The generators of a machine's GPUs, by index."""

    def __init__(self, monkeypatch, count):
        self.states = [torch.full((16,), index, dtype=torch.uint8) for index in range(count)]
        monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: self.states[device.index].clone())
        monkeypatch.setattr(torch.cuda, "set_rng_state", self._set)

    def _set(self, state, device):
        self.states[device.index] = state


def gpu(index):
    return torch.device("cuda", index)


def test_ranks_spread_over_machines_in_another_way_find_their_own_states(monkeypatch, tmp_path):
    """Saved on two machines of four GPUs, restored on one of eight: rank 5 had GPU 1, and has GPU 5."""
    for first in (0, 4):
        machine = Devices(monkeypatch, 4)
        for index in range(4):
            machine.states[index] = torch.full((16,), 100 + first + index, dtype=torch.uint8)
            save_device_state(tmp_path, first + index, gpu(index))
    machine = Devices(monkeypatch, 8)
    for rank in range(8):
        load_device_state(tmp_path, rank, gpu(rank))
    assert [int(state[0]) for state in machine.states] == list(range(100, 108))


def test_without_a_saved_state_of_its_own_a_gpu_keeps_what_accelerate_restored(monkeypatch, tmp_path):
    """A checkpoint of an earlier version, or a rank that is new."""
    machine = Devices(monkeypatch, 2)
    load_device_state(tmp_path, 1, gpu(1))
    assert int(machine.states[1][0]) == 1


def test_a_process_on_a_cpu_writes_none(tmp_path):
    save_device_state(tmp_path, 0, CPU)
    assert not list(tmp_path.iterdir())
