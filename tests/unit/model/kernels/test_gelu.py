"""GELU is GELU, whichever way it is computed."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from accel_train.model.kernels import gelu as module
from accel_train.model.kernels.gelu import gelu

LARGE = (8, 1 << 15)


def spread(shape=LARGE, dtype=torch.float32):
    """Values of every size at which the two branches of a GELU differ, and exact zeros."""
    x = torch.linspace(-12, 12, torch.Size(shape).numel(), dtype=dtype).view(shape)
    x.view(-1)[::1000] = 0
    return x.requires_grad_()


def both(function, x, seed=0):
    x = x.detach().clone().requires_grad_()
    y = function(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(seed)).to(y.dtype))
    return y.detach(), x.grad


def tanh_gelu(x):
    return functional.gelu(x, approximate="tanh")


def test_values_and_gradients_are_as_exact_as_pytorchs():
    exact, ours, theirs = both(tanh_gelu, spread().double()), both(gelu, spread()), both(tanh_gelu, spread())
    for one, other, true in zip(ours, theirs, exact, strict=True):
        assert one.dtype == torch.float32
        assert (one - true).abs().max() <= 2 * (other - true).abs().max()
        assert not torch.equal(one, other), "this test went the way of PyTorch's kernel"


def test_without_gradients_the_values_are_the_same_bits():
    x = spread()
    with torch.no_grad():
        assert torch.equal(gelu(x), gelu(x.detach()))
    assert torch.equal(gelu(x).detach(), gelu(x.detach()))


def test_the_input_is_not_written_to():
    x = spread()
    before = x.detach().clone()
    gelu(x).sum().backward()
    assert torch.equal(x.detach(), before)


@pytest.mark.parametrize(
    "x",
    [spread((8, 100)), spread(dtype=torch.float64), spread(dtype=torch.bfloat16), spread().T],
    ids=["small", "float64", "bfloat16", "transposed"],
)
def test_everything_else_goes_to_pytorch(x, monkeypatch):
    monkeypatch.setattr(module, "_BySigmoid", None)
    assert torch.equal(gelu(x), tanh_gelu(x))


def test_so_does_a_compiled_graph(monkeypatch):
    monkeypatch.setattr(module, "_BySigmoid", None)
    x = spread()
    assert torch.equal(torch.compile(gelu, backend="eager", fullgraph=True)(x), tanh_gelu(x))


@pytest.mark.parametrize("value", [1e12, -1e12, float("nan")])
def test_the_ends_of_the_range_are_as_pytorchs(value):
    x = torch.full(LARGE, value)
    for ours, theirs in zip(both(gelu, x), both(tanh_gelu, x), strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)
