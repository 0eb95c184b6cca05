"""A step on its own: its order, its outcomes, and what it leaves alone."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from rank_processes import finish, start_ranks
from torch import nn

from accel_train.config.sections import TrainingConfig
from accel_train.data.permutation import GlobalBatchSampler
from accel_train.ranks.accelerator import build_accelerator
from accel_train.training import step as step_module
from accel_train.training.hooks import Hooks
from accel_train.training.losses import next_token_cross_entropy
from accel_train.training.plan import cosine_with_warmup
from accel_train.training.step import Outcome, Step, build_optimizer
from accel_train.training.trainer import Trainer

STEPS = 5


def factor(step: int) -> float:
    return cosine_with_warmup(step, 1, STEPS)


def step_of(model: nn.Module, config: TrainingConfig, **options) -> Step:
    accelerator = build_accelerator(config)
    optimizer = build_optimizer(model, config, torch.device("cpu"))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    prepared = accelerator.prepare(model, optimizer, scheduler)
    options = {"loss_fn": next_token_cross_entropy, "hooks": Hooks(model, {}, {})} | options
    return Step(accelerator, *prepared, config=config, **options)


def batches(dataset, count: int, size: int = 4) -> list[tuple[torch.Tensor, torch.Tensor]]:
    rows = [dataset.tokens[number * size : (number + 1) * size] for number in range(count)]
    return [(part[:, :-1], part[:, 1:]) for part in rows]


def bits(model: nn.Module) -> bytes:
    return b"".join(p.detach().numpy().tobytes() for p in model.parameters())


@pytest.mark.parametrize("max_norm", [None, 0.05])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_steps_equal_a_hand_written_loop(tiny_model, tiny_dataset, max_norm, accumulation):
    """Forward, loss, backward, clip, optimizer, schedule, gradients away: bit for bit."""
    config = TrainingConfig(
        batch_size=8, learning_rate=1e-2, max_grad_norm=max_norm, gradient_accumulation_steps=accumulation
    )
    model, by_hand = tiny_model(dropout=0.3), tiny_model(dropout=0.3)
    parts = batches(tiny_dataset(), STEPS * accumulation)

    torch.manual_seed(1)
    step = step_of(model, config)
    for number, batch in enumerate(parts):
        loss = step.micro_step(batch)
        assert step.is_complete is ((number + 1) % accumulation == 0)
        if step.is_complete:
            assert step.update(loss, number // accumulation) is Outcome.MADE

    torch.manual_seed(1)
    optimizer = build_optimizer(by_hand, config, torch.device("cpu"))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    for number, batch in enumerate(parts, 1):
        loss = next_token_cross_entropy(by_hand, batch)
        (loss / accumulation if accumulation > 1 else loss).backward()
        if number % accumulation == 0:
            nn.utils.clip_grad_norm_(by_hand.parameters(), max_norm or math.inf)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    assert bits(model) == bits(by_hand)


def test_the_norm_is_that_before_clipping(tiny_model, tiny_dataset):
    model = tiny_model()
    step = step_of(model, TrainingConfig(batch_size=4, max_grad_norm=1e-4))
    loss = step.micro_step(batches(tiny_dataset(), 1)[0])
    gradients = [p.grad.clone() for p in model.parameters()]
    step.update(loss, 0)
    expected = math.sqrt(sum(float(g.double().pow(2).sum()) for g in gradients))
    assert float(step.grad_norm) == pytest.approx(expected, rel=1e-5)
    assert expected > 1e-3


def test_gradients_are_gone_after_an_update(tiny_model, tiny_dataset):
    model = tiny_model()
    step = step_of(model, TrainingConfig(batch_size=4))
    step.update(step.micro_step(batches(tiny_dataset(), 1)[0]), 0)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_leaves_the_weights(tiny_model, tiny_dataset, bad):
    model = tiny_model()
    before = bits(model)
    step = step_of(model, TrainingConfig(batch_size=4), loss_fn=lambda m, b: next_token_cross_entropy(m, b) * bad)
    loss = step.micro_step(batches(tiny_dataset(), 1)[0])
    assert step.update(loss, 0) is Outcome.NOT_FINITE
    assert bits(model) == before


def test_hooks_see_the_gradients_before_clipping(tiny_model, tiny_dataset):
    model, seen = tiny_model(), {}
    hooks = Hooks(model, {}, {"see": lambda number, found: seen.update({number: found["out.weight"].norm()})})
    step = step_of(model, TrainingConfig(batch_size=4, max_grad_norm=1e-4), hooks=hooks)
    step.update(step.micro_step(batches(tiny_dataset(), 1)[0]), 7)
    assert list(seen) == [7]
    assert float(seen[7]) > 1e-4


def test_a_throwaway_backward_changes_nothing(tiny_model, tiny_dataset):
    model = tiny_model()
    before, step = bits(model), step_of(model, TrainingConfig(batch_size=4))
    step.throwaway_backward(batches(tiny_dataset(), 1)[0])
    assert bits(model) == before
    assert all(p.grad is None for p in model.parameters())


def test_the_host_knows_of_every_update_on_a_cpu(tiny_model):
    assert step_of(tiny_model(), TrainingConfig(batch_size=4)).updates_made() is None


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_past_the_wrappers_and_through_them_weights_are_the_same(tiny_model, tiny_dataset, monkeypatch, accumulation):
    config = TrainingConfig(max_epochs=2, batch_size=8, gradient_accumulation_steps=accumulation, learning_rate=1e-2)
    one, other = tiny_model(dropout=0.2), tiny_model(dropout=0.2)
    direct = Trainer(one, tiny_dataset(), config)
    monkeypatch.setattr(step_module, "wrappers_add_nothing", lambda accelerator: False)
    wrapped = Trainer(other, tiny_dataset(), config)
    assert (direct._step.is_direct, wrapped._step.is_direct) == (True, False)
    assert direct.fit().train_loss == wrapped.fit().train_loss
    assert bits(one) == bits(other)
    assert direct._scheduler.state_dict() == wrapped._scheduler.state_dict()


@pytest.mark.parametrize("accumulation", [1, 2, 4, 8])
def test_micro_batches_add_up_to_the_gradient_of_the_whole_batch(tiny_model, tiny_dataset, accumulation):
    """Against the whole batch in float64: the largest error is 1e-6 of the largest gradient."""
    model, found = tiny_model(), {}

    def grab(_step, gradients):
        found.update({name: gradient.double().clone() for name, gradient in gradients.items()})

    dataset = tiny_dataset()
    config = TrainingConfig(max_steps=1, batch_size=8, gradient_accumulation_steps=accumulation)
    trainer = Trainer(model, dataset, config, hooks=Hooks(model, {}, {"grab": grab}))
    ids = next(iter(GlobalBatchSampler(len(dataset), 8, trainer.seed)))
    reference = tiny_model().double()
    next_token_cross_entropy(reference, (dataset.tokens[ids, :-1], dataset.tokens[ids, 1:])).backward()
    trainer.fit()
    for name, parameter in reference.named_parameters():
        error = (found[name] - parameter.grad).abs().max() / parameter.grad.abs().max()
        assert error < 1e-6, name


def test_two_ranks_sum_their_gradients_in_the_last_micro_step_only():
    body = """
import hashlib, json, os
import torch
from accel_train.config.sections import TrainingConfig
from accel_train.data.permutation import GlobalBatchSampler
from accel_train.training.hooks import Hooks
from accel_train.training.losses import next_token_cross_entropy
from accel_train.training import step
from accel_train.training.trainer import Trainer
torch.manual_seed(0)
tokens = torch.randint(0, 11, (40, 6))
dataset = [(row[:-1], row[1:]) for row in tokens]
config = TrainingConfig(max_epochs=1, batch_size=8, gradient_accumulation_steps=2)
found = []
add_nothing = step.wrappers_add_nothing
for decides in (add_nothing, lambda accelerator: False):
    step.wrappers_add_nothing = decides
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Embedding(11, 8), torch.nn.Linear(8, 11))
    syncs = []
    def loss_fn(model, batch):
        syncs.append(model.require_backward_grad_sync)
        return next_token_cross_entropy(model, batch)
    trainer = Trainer(model, dataset, config, loss_fn=loss_fn)
    assert trainer._step.is_direct is (decides is add_nothing)
    trainer.fit()
    digest = hashlib.sha256(b"".join(v.numpy().tobytes() for v in model.state_dict().values())).hexdigest()
    found.append([digest, syncs[-10:]])
print(json.dumps({"direct": found[0], "wrapped": found[1]}), flush=True)
trainer.accelerator.end_training()
"""
    outputs = finish(start_ranks(body, 2, ACCELERATE_USE_CPU="true"))
    for (output,) in outputs:
        assert output["direct"] == output["wrapped"]
        assert output["direct"][1] == [False, True] * 5
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize(
    ("distributed_type", "scaler", "nothing"),
    [
        (DistributedType.NO, None, True),
        (DistributedType.MULTI_CPU, None, True),
        (DistributedType.MULTI_GPU, None, True),
        (DistributedType.NO, object(), False),
        (DistributedType.FSDP, None, False),
        (DistributedType.DEEPSPEED, None, False),
    ],
)
def test_wrappers_that_do_something_are_used(distributed_type, scaler, nothing):
    accelerator = SimpleNamespace(distributed_type=distributed_type, scaler=scaler)
    assert step_module.wrappers_add_nothing(accelerator) is nothing
