"""Past Accelerate's wrappers and through them: the same bits."""

from __future__ import annotations

import pytest
import torch
from accelerate.utils import DistributedType
from rank_processes import finish, start_ranks

from accel_train.config.sections import TrainingConfig
from accel_train.data.permutation import GlobalBatchSampler
from accel_train.training.hooks import Hooks
from accel_train.training.losses import next_token_cross_entropy
from accel_train.training.trainer import Trainer
from accel_train.training.update import DirectUpdater, Updater, build_updater


def bits(model: torch.nn.Module) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in model.state_dict().items()}


def through_accelerate(trainer: Trainer) -> Trainer:
    prepared = trainer.accelerator, trainer.model, trainer._optimizer, trainer._scheduler
    trainer._step.updater = Updater(*prepared, trainer._step.parameters)
    return trainer


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_they_train_the_same_weights(tiny_model, tiny_dataset, accumulation):
    config = TrainingConfig(max_epochs=2, batch_size=8, gradient_accumulation_steps=accumulation, learning_rate=1e-2)
    one, other = tiny_model(dropout=0.2), tiny_model(dropout=0.2)
    direct = Trainer(one, tiny_dataset(), config)
    assert type(direct._step.updater) is DirectUpdater
    wrapped = through_accelerate(Trainer(other, tiny_dataset(), config))
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
from accel_train.training.update import DirectUpdater, Updater
from accel_train.training.trainer import Trainer
torch.manual_seed(0)
tokens = torch.randint(0, 11, (40, 6))
dataset = [(row[:-1], row[1:]) for row in tokens]
config = TrainingConfig(max_epochs=1, batch_size=8, gradient_accumulation_steps=2)
found = []
for kind in (DirectUpdater, Updater):
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Embedding(11, 8), torch.nn.Linear(8, 11))
    syncs = []
    def loss_fn(model, batch):
        syncs.append(model.require_backward_grad_sync)
        return next_token_cross_entropy(model, batch)
    trainer = Trainer(model, dataset, config, loss_fn=loss_fn)
    prepared = trainer.accelerator, trainer.model, trainer._optimizer, trainer._scheduler
    assert type(trainer._step.updater) is DirectUpdater
    trainer._step.updater = kind(*prepared, parameters=trainer._step.parameters)
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
    ("distributed_type", "scaler", "kind"),
    [
        (DistributedType.NO, None, DirectUpdater),
        (DistributedType.MULTI_GPU, None, DirectUpdater),
        (DistributedType.NO, object(), Updater),
        (DistributedType.FSDP, None, Updater),
        (DistributedType.DEEPSPEED, None, Updater),
    ],
)
def test_wrappers_that_do_something_are_used(tiny_model, tiny_dataset, distributed_type, scaler, kind):
    trainer = Trainer(tiny_model(), tiny_dataset(), TrainingConfig(max_epochs=1, batch_size=8))

    class Prepared:
        gradient_accumulation_steps = 1
        device = torch.device("cpu")

    accelerator = Prepared()
    accelerator.distributed_type, accelerator.scaler = distributed_type, scaler
    found = build_updater(accelerator, trainer.model, trainer._optimizer, trainer._scheduler, trainer._step.parameters)
    assert type(found) is kind
