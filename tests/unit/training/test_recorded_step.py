"""A recorded step, on a CPU: recorded by a stand-in for the CUDA graph that runs the same work again."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from accel_train.config.sections import ModelConfig, TrainingConfig
from accel_train.data.loader import DatasetWithIds
from accel_train.data.windows import SamplesOnDevice
from accel_train.errors import NonFinite
from accel_train.model.transformer import TransformerLM
from accel_train.tasks.walks.dataset import WalkDataset
from accel_train.training import recorded_step as recorded
from accel_train.training import step
from accel_train.training.losses import fused_cross_entropy, next_token_cross_entropy
from accel_train.training.recorded_step import RecordedStep, why_not
from accel_train.training.trainer import Trainer

CONFIG = TrainingConfig(max_epochs=2, batch_size=8, log_interval=3, cuda_graph=True)


def bits(model: torch.nn.Module) -> dict[str, bytes]:
    return {name: value.detach().numpy().tobytes() for name, value in model.state_dict().items()}


@pytest.fixture
def captures(monkeypatch):
    """How often was recorded and how often replayed."""
    counts = {"recorded": 0, "replayed": 0}

    def capture(work, device):
        for _ in range(3):
            work()
        counts["recorded"] += 1
        outputs = torch.zeros(()), torch.zeros(())

        def replay():
            counts["replayed"] += 1
            for place, value in zip(outputs, work(), strict=True):
                place.copy_(value)

        return outputs, replay

    monkeypatch.setattr(recorded, "capture", capture)
    return counts


def as_on_gpu(trainer: Trainer) -> Trainer:
    trainer._step.freeze_on_device(trainer._optimizer.optimizer)
    return trainer


def test_it_trains_the_weights_of_the_loop(tiny_model, tiny_dataset, captures):
    one, other = tiny_model(dropout=0.2), tiny_model(dropout=0.2)
    loop = Trainer(one, tiny_dataset(), CONFIG).fit()
    replayed = as_on_gpu(Trainer(other, tiny_dataset(), CONFIG)).fit()
    assert captures == {"recorded": 1, "replayed": loop.step}
    assert replayed.train_loss == loop.train_loss
    assert replayed.fingerprint == loop.fingerprint
    assert replayed.tokens_seen == loop.tokens_seen
    assert bits(one) == bits(other)


def test_a_run_in_two_parts_has_the_bits_of_one(tiny_model, tiny_dataset, captures, tmp_path):
    whole, parted, again = (tiny_model(dropout=0.2) for _ in range(3))
    as_on_gpu(Trainer(whole, tiny_dataset(), CONFIG)).fit()

    def fail_in_epoch_two(model, loop_state, should_stop):
        if loop_state.step > 5:
            raise ZeroDivisionError
        return {}

    first = as_on_gpu(Trainer(parted, tiny_dataset(), CONFIG, run_dir=tmp_path, evaluate=fail_in_epoch_two))
    with pytest.raises(ZeroDivisionError):
        first.fit()
    second = as_on_gpu(Trainer(again, tiny_dataset(), CONFIG, run_dir=tmp_path))
    assert second.fit().resumes[0]["step"] == 5
    assert captures["recorded"] == 3
    assert bits(again) == bits(whole)


def test_a_bad_loss_freezes_everything_and_is_named_by_its_step(tiny_model, tiny_dataset, captures):
    model, poison = tiny_model(), torch.zeros(())

    seen = []

    def loss_fn(model, batch):
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        if len(seen) == 3 + 4:  # after three passes that warm up
            poison.fill_(math.nan)
        return next_token_cross_entropy(model, batch) + poison

    trainer = as_on_gpu(Trainer(model, tiny_dataset(), CONFIG, loss_fn=loss_fn))
    with pytest.raises(NonFinite) as stopped:
        trainer.fit()
    assert captures["replayed"] == 5, "until the end of the epoch, where it is looked at"
    assert stopped.value.step == 4
    assert all(torch.equal(value, seen[6][name]) for name, value in model.state_dict().items())


def test_recording_leaves_weights_optimizer_and_random_states_alone(tiny_model, tiny_dataset, captures):
    model = tiny_model(dropout=0.5)
    trainer = as_on_gpu(Trainer(model, tiny_dataset(), CONFIG))
    before, state = bits(model), torch.get_rng_state()
    trainer._step.record(lambda: trainer._batches.one(0, 0))
    assert captures["recorded"] == 1
    assert bits(model) == before
    assert torch.equal(torch.get_rng_state(), state)
    for of_parameter in trainer._optimizer.optimizer.state.values():
        assert not any(tensor.any() for tensor in of_parameter.values())


def test_what_cannot_be_recorded_is_launched_as_ever_and_said(tiny_model, tiny_dataset, monkeypatch, caplog):
    def refuses(work, device):
        work()
        raise RuntimeError("operation not permitted when stream is capturing\nand a long explanation")

    one, other = tiny_model(dropout=0.2), tiny_model(dropout=0.2)
    Trainer(one, tiny_dataset(), CONFIG).fit()
    monkeypatch.setattr(recorded, "capture", refuses)
    as_on_gpu(Trainer(other, tiny_dataset(), CONFIG)).fit()
    (told,) = [record for record in caplog.records if "CUDA graph" in record.getMessage()]
    assert told.levelname == "WARNING", "somebody counts on it"
    assert "launched one by one: operation not permitted when stream is capturing" in caplog.text
    assert "long explanation" not in caplog.text
    assert bits(one) == bits(other)


@pytest.mark.parametrize(("asked", "level"), [(True, "WARNING"), (None, "INFO")])
def test_what_is_known_beforehand_is_a_warning_to_those_who_asked(asked, level, tiny_dataset, caplog, captures):
    config = dataclasses.replace(CONFIG, cuda_graph=asked, gradient_accumulation_steps=2)
    walks = WalkDataset(np.random.default_rng(0).integers(11, size=(16, 9), dtype=np.uint16), 8)
    with caplog.at_level("INFO"):
        as_on_gpu(Trainer(our_model(), walks, config)).fit()
    (told,) = [record for record in caplog.records if "gradient accumulation" in record.getMessage()]
    assert told.levelname == level
    assert captures["recorded"] == 0


def test_loss_scaling_is_a_reason_that_is_told(tiny_model, tiny_dataset, caplog, monkeypatch):
    """The weights are not frozen on the device then: the scaler skips a bad step."""
    trainer = Trainer(tiny_model(), tiny_dataset(), CONFIG)
    monkeypatch.setattr(trainer._step, "_accelerator", SimpleNamespace(device=torch.device("cuda")))
    monkeypatch.setattr(step, "why_not", lambda *_, **__: "fp16's loss scaling")
    trainer._step.record(lambda: None)
    assert "launched one by one: fp16's loss scaling" in caplog.text


def our_model() -> TransformerLM:
    return TransformerLM(ModelConfig(d_model=8, n_layers=1, n_heads=1, max_seq_len=8), 11)


def a_loss_of_mine(model, batch):
    return next_token_cross_entropy(model, batch)


@pytest.mark.parametrize(
    ("wanted", "ours", "loss_fn", "recorded"),
    [
        (None, True, next_token_cross_entropy, 1),
        (None, True, fused_cross_entropy, 1),
        (None, True, a_loss_of_mine, 0),
        (None, False, next_token_cross_entropy, 0),
        (True, False, a_loss_of_mine, 1),
        (False, True, next_token_cross_entropy, 0),
    ],
)
def test_what_may_do_something_in_python_is_recorded_on_demand_only(
    tiny_model, tiny_dataset, captures, wanted, ours, loss_fn, recorded
):
    config = TrainingConfig(max_steps=2, batch_size=8, cuda_graph=wanted)
    model = our_model() if ours else tiny_model()
    as_on_gpu(Trainer(model, tiny_dataset(), config, loss_fn=loss_fn)).fit()
    assert captures["recorded"] == recorded


def test_batches_of_another_shape_are_computed_as_ever(tiny_model, captures):
    """Every third sequence is shorter: batches of one, whose length is that of their sequence."""
    tokens = torch.randint(0, 11, (12, 6), generator=torch.Generator().manual_seed(0))
    rows = [row[: 4 if i % 3 else 6] for i, row in enumerate(tokens)]
    samples = [(row[:-1], row[1:]) for row in rows]
    weights = []
    for wanted in (True, False):
        model = tiny_model(dropout=0.2)
        config = TrainingConfig(max_epochs=2, batch_size=1, cuda_graph=wanted)
        as_on_gpu(Trainer(model, samples, config)).fit()
        weights.append(bits(model))
    assert captures["recorded"] == 1
    assert 0 < captures["replayed"] < 24
    assert weights[0] == weights[1]


class Prepared:
    """What decides, of an Accelerator."""

    def __init__(self, **differences):
        self.num_processes, self.scaler, self.gradient_accumulation_steps = 1, None, 1
        self.state = Accelerator().state
        self.__dict__.update(differences)


class Dynamo:
    class state:
        class dynamo_plugin:
            mode = "reduce-overhead"


@pytest.mark.parametrize(
    ("differences", "hooks", "says"),
    [
        ({}, False, None),
        ({}, True, "hooks"),
        ({"num_processes": 2}, False, "several processes"),
        ({"scaler": object()}, False, "fp16"),
        ({"gradient_accumulation_steps": 2}, False, "accumulation"),
        ({"state": Dynamo.state}, False, "reduce-overhead"),
    ],
)
def test_why_not(differences, hooks, says):
    found = why_not(Prepared(**differences), hooks=hooks)
    assert found is None if says is None else says in found


def test_batches_of_any_structure(captures):
    """Every tensor of a batch reaches the step."""

    def step(batch):
        return batch["a"].sum() + batch["b"][0].sum(), batch["b"][1].sum()

    def batch(value):
        return {"a": torch.full((2,), value), "b": (torch.full((3,), value), torch.full((4,), value))}

    replay = RecordedStep(step, batch(1.0), lambda frozen: None)
    assert [float(tensor) for tensor in replay(batch(2.0))] == [10.0, 8.0]
    assert [float(tensor) for tensor in replay(batch(3.0))] == [15.0, 12.0]


def test_samples_from_a_stream_on_the_device_train_the_same_weights(tiny_model):
    walks = np.random.default_rng(0).integers(11, size=(20, 13), dtype=np.uint16)
    one, other = tiny_model(dropout=0.2), tiny_model(dropout=0.2)
    from_file = Trainer(one, WalkDataset(walks, 5), CONFIG).fit()
    trainer = Trainer(other, WalkDataset(walks, 5), CONFIG)
    trainer._batches.direct = DatasetWithIds(SamplesOnDevice(WalkDataset(walks, 5), torch.device("cpu")))
    on_device = trainer.fit()
    assert on_device.train_loss == from_file.train_loss
    assert on_device.fingerprint == from_file.fingerprint
    assert bits(one) == bits(other)
