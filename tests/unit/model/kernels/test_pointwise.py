"""GELU is GELU, whichever way it is computed; dropout: its distribution, its gradient, its random numbers."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from accel_train.model.kernels import pointwise as module
from accel_train.model.kernels.pointwise import Dropout, gelu

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


ELEMENTS = 1_000_000


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5, 0.9])
def test_it_zeroes_the_given_fraction_and_keeps_the_mean(p):
    torch.manual_seed(0)
    y = Dropout(p)(torch.ones(ELEMENTS))

    dropped = (y == 0).double().mean().item()
    deviation = (p * (1 - p) / ELEMENTS) ** 0.5
    assert dropped == pytest.approx(p, abs=5 * deviation + 2**-16)
    assert y.double().mean().item() == pytest.approx(1, abs=5 * deviation / (1 - p))
    assert len(y.unique()) == 2, "an element is dropped, or scaled as every other"


@pytest.mark.parametrize("p", [0.3, 0.5])
def test_elements_are_independent(p):
    """Four masks come from one random number: neighbours at every distance up to eight are uncorrelated."""
    torch.manual_seed(1)
    kept = (Dropout(p)(torch.ones(ELEMENTS)) != 0).double() - (1 - p)
    for distance in range(1, 9):
        correlation = (kept[:-distance] * kept[distance:]).mean().item() / (p * (1 - p))
        assert abs(correlation) < 5 / ELEMENTS**0.5, f"elements {distance} apart are correlated"
    for place in range(4):
        dropped = (kept[place::4] < 0).double().mean().item()
        assert dropped == pytest.approx(p, abs=5 * (p * (1 - p) * 4 / ELEMENTS) ** 0.5 + 2**-16)


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 5), (3, 4, 7), (0, 4)])
def test_any_shape_and_its_gradient(shape):
    torch.manual_seed(2)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y = Dropout(0.4)(x)
    assert y.shape == x.shape
    assert y.dtype == x.dtype

    y.sum().backward()
    scale = torch.where(y == 0, 0.0, y / x).detach()
    assert torch.allclose(x.grad, scale, rtol=1e-14)


def test_a_transposed_input_is_dropped_element_by_element():
    torch.manual_seed(3)
    y = Dropout(0.5)(torch.ones(64, 32).T)
    assert set(y.unique().tolist()) == {0.0, y.max().item()}
    assert 0.4 < (y == 0).double().mean().item() < 0.6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_dtype_is_kept(dtype):
    torch.manual_seed(4)
    y = Dropout(0.25)(torch.ones(1000, dtype=dtype))
    assert y.dtype == dtype
    assert y.max().item() == pytest.approx(1 / 0.75, rel=0.01)


def test_mask_does_not_depend_on_the_number_of_threads():
    x = torch.ones(1_000_000)
    threads = torch.get_num_threads()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, second = Dropout(0.3)(x), Dropout(0.3)(x)
    assert not torch.equal(first, second)
    try:
        # Another number than the one above, which is 1 in a test run.
        torch.set_num_threads(threads + 1)
        torch.set_rng_state(state)
        assert torch.equal(Dropout(0.3)(x), first)
        assert torch.equal(Dropout(0.3)(x), second)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(("p", "training"), [(0.0, True), (0.5, False)])
def test_without_dropout_nothing_is_copied_or_drawn(p, training):
    state, x = torch.get_rng_state(), torch.ones(8)
    assert Dropout(p).train(training)(x) is x
    assert torch.equal(torch.get_rng_state(), state)


def test_everything_dropped_is_zero():
    assert Dropout(1.0)(torch.ones(100)).eq(0).all()


def test_a_compiled_model_draws_as_torch_does():
    """Inside a compiled graph the mask is fused with its neighbours, which no view of raw bits would be."""
    torch.manual_seed(6)
    exported = torch.export.export(Dropout(0.3).train(), (torch.ones(4, 4),), strict=False)
    assert any("dropout" in str(node.target) for node in exported.graph.nodes)
