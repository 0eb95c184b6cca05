"""fp16 and its loss scaling. Accelerate refuses it on a CPU, which can do it: it is switched on behind its back."""

from __future__ import annotations

import math

import pytest
import torch

from accel_train.config.sections import CheckpointConfig, TrainingConfig
from accel_train.errors import NonFinite
from accel_train.ranks.accelerator import build_accelerator
from accel_train.training.callbacks import Callback
from accel_train.training.hooks import Hooks
from accel_train.training.trainer import Trainer

CONFIG = TrainingConfig(max_epochs=3, batch_size=8, learning_rate=1e-2, log_interval=3)
OVERFLOWS = {4, 9}


@pytest.fixture
def scaling_trainer(monkeypatch):
    def make(model, dataset, config=CONFIG, **options):
        accelerator = build_accelerator(config)
        monkeypatch.setitem(accelerator.state._shared_state, "_mixed_precision", "fp16")
        accelerator.native_amp = True
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=4)
        return Trainer(model, dataset, config, accelerator=accelerator, **options)

    return make


class Overflow:
    """The gradient of one weight is infinite in some steps, counted from 1 over all launches."""

    def __init__(self, model, steps=OVERFLOWS):
        self.steps, self.trainer = steps, None
        model.out.weight.register_hook(self)

    def __call__(self, gradient):
        return gradient * math.inf if self.trainer.state.step + 1 in self.steps else gradient


class Watch(Callback):
    def __init__(self, model):
        self.model, self.weights, self.rates = model, [], []

    def on_step_end(self, state):
        self.weights.append(self.model.out.weight.detach().clone())
        self.rates.append(state.lr)


def test_an_overflow_is_a_skipped_step_and_the_schedule_waits(tiny_model, tiny_dataset, scaling_trainer):
    model = tiny_model()
    overflow, watch = Overflow(model), Watch(model)
    trainer = overflow.trainer = scaling_trainer(model, tiny_dataset(), callbacks=[watch])
    assert not trainer._step.is_direct
    state = trainer.fit()
    assert (state.step, state.skipped_steps) == (15, 2)
    still = [step for step in range(2, 16) if torch.equal(watch.weights[step - 1], watch.weights[step - 2])]
    assert still == sorted(OVERFLOWS)
    assert trainer._scheduler.scheduler.last_epoch == 15 - 2
    schedule = trainer.plan.learning_rate
    assert watch.rates[2] == watch.rates[3] == schedule(2), "a skipped step shows the rate of the last update"
    assert watch.rates[-1] == schedule(15 - 2 - 1)


def test_a_step_reads_the_scale_once(tiny_model, tiny_dataset, scaling_trainer, monkeypatch):
    """On a GPU every read waits for the device."""
    reads = []
    get_scale = torch.amp.GradScaler.get_scale
    monkeypatch.setattr(torch.amp.GradScaler, "get_scale", lambda scaler: reads.append(1) or get_scale(scaler))
    state = scaling_trainer(tiny_model(), tiny_dataset()).fit()
    assert state.step == 15
    assert len(reads) == 15 + 1, "and once more before the first update"


@pytest.mark.parametrize("hooked", [False, True])
def test_the_norm_and_what_hooks_see_are_those_of_the_true_gradients(tiny_model, tiny_dataset, scaling_trainer, hooked):
    """Not of the scaled ones, a thousand times larger; with hooks they are unscaled before clipping, once."""

    def first_step(make):
        model, seen = tiny_model(), {}

        class Norm(Callback):
            def on_step_end(self, state):
                seen["norm"] = state.grad_norm

        hooks = Hooks(model, {}, {"see": lambda _step, found: seen.update(weight=found["out.weight"].clone())})
        config = TrainingConfig(max_steps=1, batch_size=8)
        make(model, tiny_dataset(), config, callbacks=[Norm()], hooks=hooks if hooked else None).fit()
        return seen

    full, half = first_step(Trainer), first_step(scaling_trainer)
    assert half["norm"] == pytest.approx(full["norm"], rel=1e-2)
    assert half["norm"] != full["norm"], "this was not fp16"
    if hooked:
        assert torch.allclose(half["weight"], full["weight"], atol=1e-2 * full["weight"].abs().max())


@pytest.mark.parametrize("stopped_at", [5, 9, 10])
def test_a_resumed_run_has_the_same_bits_scale_and_count(
    tiny_model, tiny_dataset, scaling_trainer, tmp_path, stopped_at
):
    def run(directory, last=None):
        model = tiny_model(dropout=0.2)
        overflow = Overflow(model)

        class Die(Callback):
            def on_step_end(self, state):
                if state.step == last:
                    raise KeyboardInterrupt

        trainer = overflow.trainer = scaling_trainer(
            model, tiny_dataset(), run_dir=directory, callbacks=[Die()], checkpoint=CheckpointConfig(every_steps=1)
        )
        if last is None:
            return model, trainer, trainer.fit()
        with pytest.raises(KeyboardInterrupt):
            trainer.fit()
        return None

    expected, undisturbed, state = run(tmp_path / "a")
    run(tmp_path / "b", stopped_at)
    found, resumed, again = run(tmp_path / "b")
    assert again.resumes
    assert again.train_loss == state.train_loss
    assert again.skipped_steps == state.skipped_steps == 2
    assert resumed.accelerator.scaler.state_dict() == undisturbed.accelerator.scaler.state_dict()
    assert all(torch.equal(a, b) for a, b in zip(expected.parameters(), found.parameters(), strict=True))


def test_a_gradient_that_overflows_at_any_scale_stops_the_run(tiny_model, tiny_dataset, scaling_trainer):
    config = TrainingConfig(max_epochs=20, batch_size=8, log_interval=7)
    model = tiny_model()
    overflow = Overflow(model, range(12, 1000))
    trainer = overflow.trainer = scaling_trainer(model, tiny_dataset(), config)
    with pytest.raises(NonFinite) as stopped:
        trainer.fit()
    assert stopped.value.step == 12 + 49
    assert len(trainer.state.train_loss) == trainer.state.step == 12 + 48
