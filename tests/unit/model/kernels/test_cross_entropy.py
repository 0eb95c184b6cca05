"""The fused loss: the number and the gradients of the plain one, in pieces of any size."""

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from accel_train.config.sections import ModelConfig
from accel_train.model.kernels import cross_entropy
from accel_train.model.kernels.cross_entropy import IGNORED, linear_cross_entropy
from accel_train.model.transformer import TransformerLM
from accel_train.training.losses import count_targets, fused_cross_entropy, next_token_cross_entropy

WIDTH, VOCAB = 12, 37


def inputs(rows, ignored=0, seed=0):
    torch.manual_seed(seed)
    x = torch.randn(rows, WIDTH, requires_grad=True)
    weight = torch.randn(VOCAB, WIDTH, requires_grad=True)
    targets = torch.randint(VOCAB, (rows,))
    targets[:ignored] = IGNORED
    return x, weight, targets


@pytest.mark.parametrize(("rows", "ignored"), [(1, 0), (8, 0), (8, 1), (50, 0), (50, 13)])
@pytest.mark.parametrize("rows_at_once", [1, 7, 1000])
def test_loss_and_gradients_are_those_of_the_plain_one(monkeypatch, rows, rows_at_once, ignored):
    monkeypatch.setitem(cross_entropy.CHUNK_ELEMENTS, "cpu", rows_at_once * VOCAB)
    x, weight, targets = inputs(rows, ignored)
    fused = 3 * linear_cross_entropy(x, weight, targets)
    found = torch.autograd.grad(fused, [x, weight])
    plain = 3 * functional.cross_entropy(x @ weight.t(), targets)
    expected = torch.autograd.grad(plain, [x, weight])
    torch.testing.assert_close(fused, plain)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("ignored", [0, 13])
def test_the_way_of_a_gpu_gives_the_same(monkeypatch, ignored):
    monkeypatch.setattr(cross_entropy, "_is_on_cpu", lambda _: False)
    monkeypatch.setitem(cross_entropy.CHUNK_ELEMENTS, "cuda", 7 * VOCAB)
    x, weight, targets = inputs(50, ignored)
    fused, plain = linear_cross_entropy(x, weight, targets), functional.cross_entropy(x @ weight.t(), targets)
    torch.testing.assert_close(fused, plain)
    found, expected = (torch.autograd.grad(each, [x, weight]) for each in (fused, plain))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


class Launched(TorchDispatchMode):
    """Counts the operations that start a kernel: those that return a view start none."""

    VIEWS = ("slice", "unsqueeze", "detach", "aten.t.", "new_empty")

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not any(view in str(func) for view in self.VIEWS):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_it_launches_few_kernels_and_never_waits(monkeypatch, dtype):
    """At GPT-2's shape, on a device without memory: there, too, reading a value back raises."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: False)
    x = torch.empty(16 * 1024, 768, device="meta", dtype=dtype, requires_grad=True)
    weight = torch.empty(50304, 768, device="meta", dtype=dtype, requires_grad=True)
    targets = torch.empty(16 * 1024, device="meta", dtype=torch.int64)
    with Launched() as launched:
        linear_cross_entropy(x, weight, targets).backward()
    assert 50 < len(launched.names) < 150
    # Deterministic, these sort their places, and up to PyTorch 2.6 they wait.
    assert not [name for name in launched.names if "scatter" in name or "index_put" in name]


def test_a_target_of_no_probability_has_its_exact_loss():
    """Its probability is 0 in float32, or so small that it has lost its digits."""
    x = torch.tensor([[200.0], [95.0], [80.0], [1.0]], requires_grad=True)
    weight = torch.tensor([[0.0], [1.0], [0.5]], requires_grad=True)
    targets = torch.tensor([0, 0, 0, 2])
    fused, plain = linear_cross_entropy(x, weight, targets), functional.cross_entropy(x @ weight.t(), targets)
    torch.testing.assert_close(fused, plain, rtol=1e-6, atol=0)
    found, expected = (torch.autograd.grad(each, [x, weight]) for each in (fused, plain))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_without_any_counted_target_it_is_nan_as_the_plain_one():
    x, weight, targets = inputs(3, ignored=3)
    assert functional.cross_entropy(x @ weight.t(), targets).isnan()
    assert linear_cross_entropy(x, weight, targets).isnan()


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_one_of_both_may_need_no_gradient(frozen):
    x, weight, targets = inputs(9)
    plain = functional.cross_entropy(x @ weight.t(), targets)
    moving = weight if frozen == "x" else x
    (expected,) = torch.autograd.grad(plain, [moving])
    (x if frozen == "x" else weight).requires_grad_(False)
    (found,) = torch.autograd.grad(linear_cross_entropy(x, weight, targets), [moving])
    torch.testing.assert_close(found, expected)


def test_evaluation_gives_the_same_number_without_gradients():
    x, weight, targets = inputs(9)
    with torch.no_grad():
        loss = linear_cross_entropy(x, weight, targets)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, linear_cross_entropy(x, weight, targets).detach(), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_small_gradients_do_not_vanish(dtype):
    rows = 4096
    torch.manual_seed(0)
    x, weight = torch.randn(rows, WIDTH), 0.1 * torch.randn(VOCAB, WIDTH)
    targets = torch.randint(VOCAB, (rows,))
    exact_x, exact_weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    expected = torch.autograd.grad(
        functional.cross_entropy(exact_x @ exact_weight.t(), targets), [exact_x, exact_weight]
    )
    half_x, half_weight = x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
    loss = 2**10 * linear_cross_entropy(half_x, half_weight, targets)
    found = torch.autograd.grad(loss, [half_x, half_weight])
    assert [each.dtype for each in found] == [dtype, dtype]
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.float() / 2**10 - theirs).norm() < 0.05 * theirs.norm()


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_asked_for_its_loss_gives_that_of_its_logits(tied):
    torch.manual_seed(0)
    config = ModelConfig(d_model=16, n_layers=1, n_heads=2, max_seq_len=8, tie_embeddings=tied)
    model = TransformerLM(config, VOCAB).double()
    batch = torch.randint(VOCAB, (5, 8)), torch.randint(VOCAB, (5, 8))
    fused, plain = fused_cross_entropy(model, batch), next_token_cross_entropy(model, batch)
    torch.testing.assert_close(fused.double(), plain, rtol=1e-6, atol=0)
    found = torch.autograd.grad(fused, list(model.parameters()))
    for ours, theirs in zip(found, torch.autograd.grad(plain, list(model.parameters())), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)


def test_under_autocast_the_loss_is_that_of_the_plain_one():
    torch.manual_seed(0)
    model = TransformerLM(ModelConfig(d_model=16, n_layers=1, n_heads=2, max_seq_len=8), VOCAB)
    batch = torch.randint(VOCAB, (5, 8)), torch.randint(VOCAB, (5, 8))
    with torch.autocast("cpu", torch.bfloat16):
        fused, plain = fused_cross_entropy(model, batch), next_token_cross_entropy(model, batch)
    torch.testing.assert_close(fused, plain, rtol=1e-2, atol=0, check_dtype=False)
    fused.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("batch", "count"),
    [
        ((torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int64)), 6),
        ((torch.zeros(2, 3), torch.tensor([[0, 1, IGNORED], [IGNORED, IGNORED, 2]])), 3),
        ({"input_ids": torch.zeros(2, 3), "labels": torch.zeros(2, 3, dtype=torch.int64)}, 4),
        ({"pixels": torch.zeros(7, 3)}, 7),
    ],
)
def test_targets_that_count_are_counted(batch, count):
    assert count_targets(batch) == count
