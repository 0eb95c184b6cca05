"""A step takes the pages of the step before. In processes of their own: malloc's settings cannot be taken back."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from accel_train.process.malloc import keep_freed_memory

needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc")

BLOCKS, BYTES, ROUNDS = 10, 16 << 20, 5
_FAULTS = f"""
import ctypes, resource, sys

libc = ctypes.CDLL(None)
libc.prctl(41, 1, 0, 0, 0)  # no huge pages, of which one fault brings 512 small ones
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]

def step():
    blocks = [libc.malloc({BYTES}) for _ in range({BLOCKS})]
    for block in blocks:
        libc.memset(block, 1, {BYTES})
    for block in reversed(blocks):
        libc.free(block)

def faults():
    step()
    step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range({ROUNDS}):
        step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
"""
_PLAIN = "print(False, faults())"
_KEPT = "from accel_train.process.malloc import keep_freed_memory; print(keep_freed_memory(), faults())"
_TRAINER = """
import torch
from accel_train.config.sections import TrainingConfig
from accel_train.training.trainer import Trainer

def loss(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()

samples = [(torch.randn(3), torch.randn(1)) for _ in range(20)]
Trainer(torch.nn.Linear(3, 1), samples, TrainingConfig(max_steps=2, batch_size=2), loss_fn=loss).fit()
print(True, faults())
"""


def _faults(script, **environment):
    line = [sys.executable, "-c", _FAULTS + script]
    done = subprocess.run(line, check=True, capture_output=True, text=True, env={**os.environ, **environment})
    in_force, faults = done.stdout.split()
    return in_force == "True", int(faults) / (ROUNDS * BLOCKS * BYTES // os.sysconf("SC_PAGE_SIZE"))


@needs_glibc
@pytest.mark.parametrize("script", [_KEPT, _TRAINER], ids=["asked for", "by the trainer"])
def test_what_is_freed_is_taken_again(script):
    in_force, per_page = _faults(script)
    assert in_force
    assert per_page < 0.05


@needs_glibc
@pytest.mark.parametrize(
    "environment",
    [{"MALLOC_TRIM_THRESHOLD_": "131072"}, {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"}],
    ids=["variable", "tunable"],
)
def test_what_the_user_has_set_stays(environment):
    in_force, per_page = _faults(_KEPT, **environment)
    assert not in_force
    assert per_page > 0.9


@needs_glibc
def test_else_every_page_comes_anew():
    """What the others would find if nothing were done."""
    assert _faults(_PLAIN)[1] > 0.9


@pytest.mark.parametrize("missing", [OSError, AttributeError, TypeError])
def test_without_such_a_malloc_nothing_happens(missing, monkeypatch):
    def absent(_name):
        raise missing

    monkeypatch.setattr("ctypes.CDLL", absent)
    assert not keep_freed_memory({})


@pytest.mark.parametrize("refused", [-1, -3])
def test_a_malloc_that_refuses_is_told_of(refused, monkeypatch):
    def mallopt(option, _value):
        return int(option != refused)

    monkeypatch.setattr("ctypes.CDLL", lambda _name: type("libc", (), {"mallopt": staticmethod(mallopt)}))
    assert not keep_freed_memory({})
