"""The loop: order of operations, callbacks, resume, stopping."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from accel_train.checkpoints.manifest import list_checkpoints
from accel_train.config.sections import CheckpointConfig, TrainingConfig
from accel_train.data.permutation import GlobalBatchSampler
from accel_train.errors import ConfigError, Interrupted, NonFinite, Preempted
from accel_train.ranks.accelerator import build_accelerator
from accel_train.training.callbacks import Callback
from accel_train.training.losses import next_token_cross_entropy
from accel_train.training.plan import cosine_with_warmup, warmup_steps
from accel_train.training.trainer import Trainer

SMALL = TrainingConfig(max_epochs=3, batch_size=8, learning_rate=1e-2, log_interval=2)


def weights(model: torch.nn.Module) -> bytes:
    return b"".join(p.detach().numpy().tobytes() for p in model.parameters())


class Recorder(Callback):
    def __init__(self) -> None:
        self.events: list[tuple] = []

    def on_train_start(self, state):
        self.events.append(("train_start", state.step))

    def on_step_end(self, state):
        self.events.append(("step_end", state.step))

    def on_log(self, state, line):
        self.events.append(("log", line["step"]))

    def on_evaluate(self, state, evaluation):
        self.events.append(("evaluate", evaluation["step"]))

    def on_checkpoint(self, state, path):
        self.events.append(("checkpoint", state.step))

    def on_epoch_end(self, state):
        self.events.append(("epoch_end", state.epoch))

    def on_train_end(self, state):
        self.events.append(("train_end", state.step))


def test_ten_lines_train_a_model_without_any_task(tiny_model, tiny_dataset):
    state = Trainer(tiny_model(), tiny_dataset(), SMALL).fit()
    assert state.step == 15
    assert len(state.train_loss) == 15
    assert state.train_loss[-1] < state.train_loss[0]
    assert state.tokens_seen == 15 * 8 * 5


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_loop_equals_a_hand_written_one_bit_for_bit(tiny_model, tiny_dataset, accumulation):
    config = TrainingConfig(
        max_epochs=2, batch_size=8, learning_rate=1e-2, gradient_accumulation_steps=accumulation, log_interval=3
    )
    dataset = tiny_dataset()
    model = tiny_model()
    state = Trainer(model, dataset, config, seed=5).fit()

    reference = tiny_model()
    optimizer = torch.optim.AdamW(
        reference.parameters(), lr=1e-2, betas=config.betas, eps=config.eps, weight_decay=0.01, fused=True
    )
    total, micro = 10, 8 // accumulation
    warm_up = warmup_steps(config, total)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: cosine_with_warmup(step, warm_up, total, config.min_lr_ratio)
    )
    sampler = GlobalBatchSampler(len(dataset), micro, 5)
    losses = []
    for epoch in range(2):
        sampler.seek(epoch, 0)
        batches = list(sampler)
        for step in range(5):
            step_losses = []
            for ids in batches[step * accumulation : (step + 1) * accumulation]:
                inputs = torch.stack([dataset[int(i)][0] for i in ids])
                targets = torch.stack([dataset[int(i)][1] for i in ids])
                loss = next_token_cross_entropy(reference, (inputs, targets))
                step_losses.append(float(loss.detach()))
                (loss / accumulation).backward()
            losses.append(sum(step_losses) / accumulation)
            torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    assert weights(model) == weights(reference)
    assert state.train_loss == losses


def test_it_overfits_ten_samples(tiny_dataset):
    torch.manual_seed(0)
    dataset = tiny_dataset(count=10, length=5)
    # A table from (position, token) to logits can hold ten sequences that share no prefix conflict.
    dataset.tokens[:, 0] = torch.arange(10)

    class Table(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(11, 32)
            self.rnn = torch.nn.GRU(32, 64, batch_first=True)
            self.out = torch.nn.Linear(64, 11)

        def forward(self, tokens):
            return self.out(self.rnn(self.embed(tokens))[0])

    config = TrainingConfig(max_epochs=300, batch_size=10, learning_rate=1e-2, warmup_steps=0, weight_decay=0.0)
    state = Trainer(Table(), dataset, config).fit()
    assert state.train_loss[-1] < 0.01


def test_callbacks_come_in_order(tiny_model, tiny_dataset, tmp_path):
    recorder = Recorder()
    Trainer(
        tiny_model(),
        tiny_dataset(count=16),
        TrainingConfig(max_epochs=1, batch_size=8, log_interval=2),
        callbacks=[recorder],
        evaluate=lambda model, state, should_stop: {"metrics": {}},
        run_dir=tmp_path,
    ).fit()
    assert recorder.events == [
        ("train_start", 0),
        ("step_end", 1),
        ("step_end", 2),
        ("log", 2),
        ("evaluate", 2),
        ("epoch_end", 1),
        ("checkpoint", 2),
        ("train_end", 2),
    ]


@pytest.mark.parametrize(("ranks", "expected"), [(1, ["wait"]), (2, ["agreement", "wait"])])
def test_ranks_agree_before_they_wait_for_the_device(ranks, expected, tiny_model, tiny_dataset, monkeypatch):
    """Whoever is gone would make it wait for ever."""
    trainer, order = Trainer(tiny_model(), tiny_dataset(), SMALL), []
    trainer.plan = dataclasses.replace(trainer.plan, world_size=ranks)
    monkeypatch.setattr(trainer._coordinator, "poll", lambda failure: order.append("agreement") or False)
    monkeypatch.setattr(trainer._losses, "collect", lambda: order.append("wait") or ([], 0))
    trainer._flush()
    assert order == expected


def test_what_ranks_gather_on_a_gpu_is_waited_for_by_polling(tiny_model, tiny_dataset, monkeypatch):
    """Behind the gather an event is recorded; with stand-ins for both."""
    trainer, asked = Trainer(tiny_model(), tiny_dataset(), SMALL), []

    class Event:
        def record(self):
            asked.append("recorded")

        def query(self):
            return True

    gathered = SimpleNamespace(device=torch.device("cuda"))
    monkeypatch.setattr(trainer.accelerator, "gather", lambda _: asked.append("gathered") or gathered)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(trainer._coordinator, "wait_for_device", lambda name, is_done: asked.append((name, is_done())))
    assert trainer._gather(torch.zeros(1)) is gathered
    assert asked == ["gathered", "recorded", ("step 0", True)]


def test_the_loop_state_can_be_read_at_any_step(tiny_model, tiny_dataset):
    seen = []

    class Reader(Callback):
        def on_step_end(self, state):
            seen.append((state.step, state.epoch, state.loss, state.lr, state.grad_norm))

    state = Trainer(tiny_model(), tiny_dataset(), SMALL, callbacks=[Reader()]).fit()
    assert [row[0] for row in seen] == list(range(1, 16))
    assert [row[1] for row in seen] == [0] * 5 + [1] * 5 + [2] * 5
    assert [row[2] for row in seen] == state.train_loss
    assert seen[0][3] == pytest.approx(SMALL.learning_rate / warmup_steps(SMALL, 15))
    assert all(row[4] > 0 for row in seen)


def test_max_steps_wins_over_epochs_and_a_final_evaluation_runs(tiny_model, tiny_dataset):
    evaluations = []

    def evaluate(model, state, should_stop):
        evaluations.append(state.step)
        return {}

    config = TrainingConfig(max_epochs=3, max_steps=7, batch_size=8)
    state = Trainer(tiny_model(), tiny_dataset(), config, evaluate=evaluate).fit()
    assert state.step == 7
    assert evaluations == [5, 7]


def test_eval_interval_replaces_the_epochs(tiny_model, tiny_dataset):
    evaluations = []

    def evaluate(model, state, should_stop):
        evaluations.append(state.step)
        return {}

    config = TrainingConfig(max_epochs=2, batch_size=8, eval_interval=4)
    Trainer(tiny_model(), tiny_dataset(), config, evaluate=evaluate).fit()
    assert evaluations == [4, 8, 10]


@pytest.mark.parametrize("interval", [None, 3])
def test_training_ends_at_once_when_the_evaluator_says_so(tiny_model, tiny_dataset, tmp_path, interval):
    def evaluate(model, state, should_stop):
        passed = state.step >= 5
        return {"passed": passed, "stop": passed}

    config = TrainingConfig(max_epochs=5, batch_size=8, eval_interval=interval)
    state = Trainer(tiny_model(), tiny_dataset(), config, evaluate=evaluate, run_dir=tmp_path).fit()
    assert state.step == (5 if interval is None else 6)
    assert state.stopped
    assert state.keep_step == state.step
    assert list_checkpoints(tmp_path / "checkpoints")[-1][0] == state.step


def run_with_interruptions(make, tmp_path, stops, config, checkpoint, *, damage=None):
    """Run to the end, asked to stop after each of ``stops`` steps; returns trainer and state."""
    for stop_at in [*stops, None]:

        class Stopper(Callback):
            def on_step_end(self, state, stop_at=stop_at):
                if state.step == stop_at:
                    os.kill(os.getpid(), signal.SIGTERM)

        trainer = make(tmp_path, config, checkpoint, [Stopper()])
        if stop_at is None:
            return trainer, trainer.fit()
        with pytest.raises(Preempted) as preempted:
            trainer.fit()
        assert preempted.value.step == stop_at
    raise AssertionError


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_run_stopped_anywhere_ends_with_the_same_bits(tiny_model, tiny_dataset, tmp_path, accumulation):
    config = TrainingConfig(
        max_epochs=3, batch_size=8, learning_rate=1e-2, log_interval=4, gradient_accumulation_steps=accumulation
    )

    def evaluate(model, state, should_stop):
        with torch.no_grad():
            return {"metrics": {"norm": float(sum(p.norm() for p in model.parameters()))}}

    def make(run_dir, config, checkpoint, callbacks):
        return Trainer(
            tiny_model(dropout=0.3),
            tiny_dataset(),
            config,
            run_dir=run_dir,
            checkpoint=checkpoint,
            callbacks=callbacks,
            evaluate=evaluate,
        )

    checkpoint = CheckpointConfig(keep_last=50)
    whole, undisturbed = run_with_interruptions(make, tmp_path / "a", [], config, checkpoint)
    resumed, state = run_with_interruptions(make, tmp_path / "b", [2, 3, 8, 10], config, checkpoint)
    assert weights(whole.unwrapped_model) == weights(resumed.unwrapped_model)
    assert state.train_loss == undisturbed.train_loss
    assert state.evaluations == undisturbed.evaluations
    assert state.fingerprint == undisturbed.fingerprint
    assert [r["step"] for r in state.resumes] == [2, 3, 8, 10]
    final = "checkpoints/step_0000015/model.safetensors"
    assert (tmp_path / "a" / final).read_bytes() == (tmp_path / "b" / final).read_bytes()


def test_an_evaluation_that_was_interrupted_is_done_after_the_resume(tiny_model, tiny_dataset, tmp_path):
    calls = []

    def evaluate(model, state, should_stop):
        calls.append(state.step)
        if len(calls) == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
            assert should_stop()
            raise Interrupted("stopped in the evaluation")
        return {"metrics": {}}

    def make():
        return Trainer(tiny_model(), tiny_dataset(), SMALL, evaluate=evaluate, run_dir=tmp_path)

    with pytest.raises(Preempted):
        make().fit()
    state = make().fit()
    assert calls == [5, 5, 10, 15]
    assert [e["step"] for e in state.evaluations] == [5, 10, 15]


def test_an_evaluation_leaves_the_training_rng_as_it_was(tiny_model, tiny_dataset):
    config = TrainingConfig(max_epochs=2, batch_size=8)
    with_evaluation, without = tiny_model(dropout=0.5), tiny_model(dropout=0.5)

    def evaluate(model, state, should_stop):
        drawn.append((torch.rand(1), np.random.rand(), random.random()))
        model(torch.zeros(2, 3, dtype=torch.int64))  # with dropout: it is still in training mode
        return {}

    drawn = []

    Trainer(with_evaluation, tiny_dataset(), config, evaluate=evaluate).fit()
    Trainer(without, tiny_dataset(), config).fit()
    assert len(drawn) == 2
    assert weights(with_evaluation) == weights(without)


def test_the_fingerprint_is_that_of_what_was_consumed(tiny_model, tiny_dataset, monkeypatch):
    def fingerprint():
        return Trainer(tiny_model(), tiny_dataset(), SMALL).fit().fingerprint

    honest = fingerprint()
    assert honest == fingerprint()
    original = GlobalBatchSampler.__iter__

    def shifted(self):
        for ids in original(self):
            yield np.roll(ids, 1)

    monkeypatch.setattr(GlobalBatchSampler, "__iter__", shifted)
    assert fingerprint() != honest


def test_a_dataset_smaller_than_a_batch_is_refused(tiny_model, tiny_dataset):
    with pytest.raises(ConfigError, match="larger than the dataset of 4 samples"):
        Trainer(tiny_model(), tiny_dataset(count=4), SMALL)


def test_a_poisoned_parameter_stops_training_and_keeps_the_last_checkpoint(tiny_model, tiny_dataset, tmp_path):
    class Poison(Callback):
        def on_step_end(self, state):
            if state.step == 7:
                with torch.no_grad():
                    model.out.weight[0, 0] = math.nan

    model = tiny_model()
    trainer = Trainer(model, tiny_dataset(), SMALL, callbacks=[Poison()], run_dir=tmp_path)
    with pytest.raises(NonFinite, match=r"step 8: .*parameter out\.weight") as stopped:
        trainer.fit()
    assert stopped.value.step == 8
    assert list_checkpoints(tmp_path / "checkpoints")[-1][0] == 5


def test_an_absurd_learning_rate_stops_training(tiny_model, tiny_dataset):
    config = TrainingConfig(max_epochs=50, batch_size=8, learning_rate=1e38, warmup_steps=0)
    with pytest.raises(NonFinite):
        Trainer(tiny_model(), tiny_dataset(), config).fit()


def test_the_skip_on_the_device_freezes_the_weights_at_the_first_bad_step(tiny_model, tiny_dataset, monkeypatch):
    """The path that a GPU takes, on the CPU: the fused kernel reads the flag, the host only at the log boundary."""
    config = TrainingConfig(max_epochs=2, batch_size=8, log_interval=5)
    kept = {}

    class Poison(Callback):
        def on_step_end(self, state):
            if state.step == 2:
                kept["before"] = weights(model)
                dataset.bad = True

    class Bad(type(tiny_dataset())):
        bad = False

    dataset = Bad()

    def loss_fn(model, batch):
        loss = next_token_cross_entropy(model, batch)
        return loss * math.nan if dataset.bad else loss

    model = tiny_model()
    trainer = Trainer(model, dataset, config, callbacks=[Poison()], loss_fn=loss_fn)
    trainer._step.freeze_on_device(trainer._optimizer.optimizer)
    with pytest.raises(NonFinite) as stopped:
        trainer.fit()
    assert stopped.value.step == 3
    assert trainer.loop_state.step == 5
    assert weights(model) == kept["before"]


def test_weight_decay_can_be_limited_to_matrices(tiny_model, tiny_dataset):
    config = TrainingConfig(max_epochs=1, batch_size=8, weight_decay=0.1, weight_decay_on="matrices")
    trainer = Trainer(tiny_model(), tiny_dataset(), config)
    decays = {p.dim(): group["weight_decay"] for group in trainer._optimizer.param_groups for p in group["params"]}
    assert decays == {2: 0.1, 1: 0.0}


def test_the_state_in_a_checkpoint_is_json_and_names_its_step(tiny_model, tiny_dataset, tmp_path):
    Trainer(tiny_model(), tiny_dataset(), SMALL, run_dir=tmp_path).fit()
    step, path = list_checkpoints(tmp_path / "checkpoints")[-1]
    state = json.loads((path / "state.json").read_text())
    assert (state["step"], state["epoch"], state["step_in_epoch"]) == (step, 3, 0)


def test_the_scheduler_advances_once_per_step_under_accumulation(tiny_model, tiny_dataset):
    config = TrainingConfig(max_epochs=1, batch_size=8, gradient_accumulation_steps=4)
    trainer = Trainer(tiny_model(), tiny_dataset(), config)
    trainer.fit()
    assert trainer._scheduler.scheduler.last_epoch == 5


def test_data_loading_workers_change_nothing(tiny_model, tiny_dataset):
    alone, helped = tiny_model(dropout=0.2), tiny_model(dropout=0.2)
    config = TrainingConfig(max_epochs=2, batch_size=8, num_workers=2)
    with_workers = Trainer(helped, tiny_dataset(), config).fit()
    without = Trainer(alone, tiny_dataset(), TrainingConfig(max_epochs=2, batch_size=8)).fit()
    assert weights(alone) == weights(helped)
    assert with_workers.fingerprint == without.fingerprint


def test_an_overflowing_gradient_is_named_by_its_own_step_on_the_path_of_a_gpu(tiny_model, tiny_dataset):
    """The loss stays finite: only the norm tells, and only at the log boundary."""
    config = TrainingConfig(max_epochs=2, batch_size=8, log_interval=5)
    model = tiny_model()
    counter = Recorder()
    trainer = Trainer(model, tiny_dataset(), config, callbacks=[counter])
    trainer._step.freeze_on_device(trainer._optimizer.optimizer)
    seen = []

    def overflow(gradient):
        seen.append(1)
        return gradient * math.inf if len(seen) == 7 else gradient

    model.out.weight.register_hook(overflow)
    with pytest.raises(NonFinite) as stopped:
        trainer.fit()
    assert stopped.value.step == 7
    assert len(trainer.state.train_loss) == trainer.state.step == 6


@pytest.mark.parametrize("seed", [2**32, 2**40])
def test_every_seed_that_the_configuration_takes_trains(tiny_model, tiny_dataset, seed):
    config = TrainingConfig(max_epochs=1, batch_size=8)
    assert Trainer(tiny_model(), tiny_dataset(), config, seed=seed).fit().step == 5


def test_an_accelerator_that_accumulates_otherwise_is_refused(tiny_model, tiny_dataset):
    accelerator = build_accelerator(TrainingConfig(batch_size=8, gradient_accumulation_steps=2))
    with pytest.raises(ConfigError, match="does not agree with the Accelerator's 2"):
        Trainer(tiny_model(), tiny_dataset(), TrainingConfig(batch_size=8), accelerator=accelerator)


def test_dictionaries_of_lists_train_as_tensors_do(tiny_model, tiny_dataset):
    tokens = tiny_dataset().tokens
    lists = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in tokens]
    tensors = [{"input_ids": row, "labels": row} for row in tokens]
    results = [Trainer(tiny_model(), data, SMALL).fit().train_loss for data in (lists, tensors)]
    assert results[0] == results[1]


def test_an_evaluator_that_returns_nothing_is_named(tiny_model, tiny_dataset):
    with pytest.raises(TypeError, match=r"evaluate\(\) must return a dictionary"):
        Trainer(tiny_model(), tiny_dataset(), SMALL, evaluate=lambda model, state, should_stop: None).fit()
