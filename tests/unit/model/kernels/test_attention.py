"""Attention that keeps its weights is attention, whichever way it is computed."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch.nn import functional

from accel_train.config.sections import ModelConfig
from accel_train.model.extraction import ExtractionMode
from accel_train.model.kernels import attention as module
from accel_train.model.kernels.attention import causal_attention, should_store_weights
from accel_train.model.transformer import TransformerLM, _rotate, rotary_angles

HEADS, WIDTH = 4, 16
WIDE = ModelConfig(d_model=HEADS * WIDTH, n_layers=2, n_heads=HEADS, max_seq_len=64)
"""With 16 sequences its weights are as many as it takes."""


def packed(time=64, batch=None, dtype=torch.float32):
    batch = batch or math.ceil(module._MIN_WEIGHTS / (HEADS * time * time))
    generator = torch.Generator().manual_seed(time)
    return torch.randn(batch, time, 3, HEADS, WIDTH, generator=generator, dtype=dtype).requires_grad_()


def angles_of(x, positions):
    return rotary_angles(0, x.shape[1], WIDTH, like=x) if positions == "rotary" else None


def by_kernel(x, angles):
    query, key, value = x.permute(2, 0, 3, 1, 4).unbind(0)
    if angles is not None:
        query, key = _rotate(query, *angles), _rotate(key, *angles)
    mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    return mixed.transpose(1, 2).flatten(2)


def both(function, x, positions):
    """The outputs, and the gradients under fixed random weights of them."""
    y = function(x, angles_of(x, positions))
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return y.detach(), torch.autograd.grad(y, x, weights)[0]


@pytest.mark.parametrize("positions", ["learned", "rotary"])
@pytest.mark.parametrize("time", [1, 7, 63, 64, 65, 128, 200])
@pytest.mark.parametrize("size", [1, 10], ids=["small-scores", "large-scores"])
def test_values_and_gradients_are_as_exact_as_pytorchs(time, positions, size):
    x = (packed(time, batch=3).detach() * size).requires_grad_()
    exact = both(by_kernel, x.detach().double().requires_grad_(), positions)
    for ours, theirs, true in zip(
        both(causal_attention, x, positions), both(by_kernel, x, positions), exact, strict=True
    ):
        assert (ours.dtype, ours.shape) == (torch.float32, theirs.shape)
        assert (ours - true).norm() <= 1.5 * (theirs - true).norm()


@pytest.mark.parametrize(
    "x",
    [packed(batch=2), torch.randn(3, 2, HEADS, 64, WIDTH).permute(1, 3, 0, 2, 4), torch.randn(1, 1, 3, HEADS, WIDTH)],
    ids=["as-the-model-has-it", "heads-apart", "one-token"],
)
def test_the_input_is_not_written_to(x):
    before = x.detach().clone()
    causal_attention(x.detach().requires_grad_(), angles_of(x, "rotary")).sum().backward()
    assert torch.equal(x.detach(), before)


def test_the_backward_pass_leaves_what_it_needs_for_another():
    x = packed(batch=2)
    y = causal_attention(x, angles_of(x, "rotary"))
    first, second = (torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("spread", [torch.Tensor.sum, lambda y: y.transpose(0, 1).reshape(-1).square().sum()])
def test_a_gradient_of_any_layout_will_do(spread):
    x = packed(batch=2)
    ours, theirs = (torch.autograd.grad(spread(way(x, None)), x)[0] for way in (causal_attention, by_kernel))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_there_is_no_second_derivative_and_none_is_made_up():
    x = packed(batch=2)
    (first,) = torch.autograd.grad(causal_attention(x, None).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_later_tokens_change_no_earlier_output_or_gradient():
    x = packed(128, batch=2)
    y = causal_attention(x, None)
    assert not torch.autograd.grad(y[:, :70].sum(), x, retain_graph=True)[0][:, 70:].any()
    changed = x.detach().clone()
    changed[:, 70:] += 1
    assert torch.equal(causal_attention(changed, None)[:, :64], y[:, :64])
    torch.testing.assert_close(causal_attention(changed, None)[:, :70], y[:, :70])


def test_which_inputs_go_this_way():
    assert should_store_weights(packed())
    assert not should_store_weights(packed().detach()), "there is no backward pass to keep anything for"
    with torch.no_grad():
        assert not should_store_weights(packed())
    assert not should_store_weights(packed(batch=2)), "small"
    assert not should_store_weights(packed(dtype=torch.float64))
    assert not should_store_weights(packed(dtype=torch.bfloat16))
    assert should_store_weights(packed(module._MAX_CONTEXT_PER_WIDTH * WIDTH))
    assert not should_store_weights(packed(module._MAX_CONTEXT_PER_WIDTH * WIDTH + 1)), (
        "weights grow with the square of the context"
    )
    assert not should_store_weights(torch.zeros(1).expand(16, module._MAX_CONTEXT + 1, 3, 4, 1024).requires_grad_())
    with torch.autocast("cpu", torch.bfloat16):
        assert not should_store_weights(packed())
    assert not should_store_weights(packed().detach().to("meta").requires_grad_())


@pytest.fixture
def taken(monkeypatch):
    """How often the model went this way."""
    calls = []

    def noted(*arguments):
        calls.append(1)
        return causal_attention(*arguments)

    monkeypatch.setattr("accel_train.model.transformer.causal_attention", noted)
    return calls


def model_and_tokens(**changes):
    torch.manual_seed(0)
    shape = dataclasses.replace(WIDE, **changes)
    return TransformerLM(shape, 50), torch.randint(50, (module._MIN_WEIGHTS // (HEADS * 64 * 64), 64))


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_a_model_computes_the_same_either_way(positions, taken, monkeypatch):
    model, tokens = model_and_tokens(positions=positions)

    def loss_and_gradients():
        model.zero_grad()
        loss = model(tokens, targets=tokens)
        loss.backward()
        return [loss.detach(), *(parameter.grad for parameter in model.parameters())]

    ours = loss_and_gradients()
    assert len(taken) == WIDE.n_layers
    monkeypatch.setattr(module, "_MIN_WEIGHTS", math.inf)
    theirs = loss_and_gradients()
    assert len(taken) == WIDE.n_layers
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_extraction_holds_the_logits_of_this_way_too(positions, taken):
    model, tokens = model_and_tokens(positions=positions)
    everything = ExtractionMode.SCORES | ExtractionMode.WEIGHTS | ExtractionMode.VALUES | ExtractionMode.RESIDUAL
    assert torch.equal(model(tokens, everything).logits, model(tokens))
    assert len(taken) == 2 * WIDE.n_layers


def test_dropout_of_weights_stays_with_pytorch(taken):
    model, tokens = model_and_tokens(attention_dropout=0.1)
    model(tokens)
    assert not taken
    model.eval()
    model(tokens)
    assert len(taken) == WIDE.n_layers


def test_so_does_a_cache_that_is_to_be_filled(taken):
    model, tokens = model_and_tokens()
    cache = model.new_cache(*tokens.shape)
    model.extend(tokens, cache)
    assert not taken
    assert cache.keys[0].any()


def test_and_a_compiled_graph(taken):
    torch.compiler.reset()  # graphs that other tests have left: beyond their limit the compiler stands aside
    model, tokens = model_and_tokens()
    torch.compile(model, backend="eager", fullgraph=True)(tokens)
    assert not taken
