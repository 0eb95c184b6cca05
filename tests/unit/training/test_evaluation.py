"""Validation losses: exact, on all ranks, without a trace in training."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from rank_processes import finish, start_ranks

from accel_train.checkpoints.manifest import list_checkpoints
from accel_train.config.sections import CheckpointConfig, TrainingConfig
from accel_train.errors import CheckpointError, Preempted
from accel_train.training.callbacks import Callback
from accel_train.training.losses import next_token_cross_entropy
from accel_train.training.services import Services
from accel_train.training.trainer import Trainer

SMALL = TrainingConfig(max_epochs=3, batch_size=8, learning_rate=1e-2, log_interval=2)


def weights(model: torch.nn.Module) -> bytes:
    return b"".join(p.detach().numpy().tobytes() for p in model.parameters())


@pytest.mark.parametrize("count", [1, 8, 21])
def test_it_is_the_mean_over_all_targets(tiny_model, tiny_dataset, count):
    held_out = tiny_dataset(count=count, seed=9)
    model = tiny_model(dropout=0.5)
    state = Trainer(model, tiny_dataset(), SMALL, validation={"val": held_out}).fit()
    model.eval()
    with torch.no_grad():
        expected = next_token_cross_entropy(model, (held_out.tokens[:, :-1], held_out.tokens[:, 1:]))
    assert [e["step"] for e in state.evaluations] == [5, 10, 15]
    assert state.evaluations[-1]["metrics"]["val_loss"] == pytest.approx(float(expected), rel=1e-6)


def test_targets_that_do_not_count_have_no_weight(tiny_model):
    torch.manual_seed(3)
    tokens = torch.randint(0, 11, (12, 6))
    labels = tokens.clone()
    labels[:8, 2:] = -100  # one counted target in each row of the first batch, five in the others
    rows = [{"input_ids": a, "labels": b} for a, b in zip(tokens, labels, strict=True)]
    model = tiny_model()
    config = TrainingConfig(max_epochs=1, batch_size=8)
    state = Trainer(model, rows, config, validation={"val": rows}).fit()
    model.eval()
    with torch.no_grad():
        expected = next_token_cross_entropy(model, {"input_ids": tokens, "labels": labels})
    assert state.evaluations[0]["metrics"]["val_loss"] == pytest.approx(float(expected), rel=1e-6)


def test_the_evaluator_sees_the_losses_and_its_figures_stand_beside_them(tiny_model, tiny_dataset):
    def evaluate(model, state, should_stop):
        assert set(state.losses) == {"val", "probe"}
        return {"metrics": {"gap": state.losses["val"] - state.losses["probe"]}, "samples": ["text"]}

    heard = []

    class Listener(Callback):
        def on_evaluate(self, state, evaluation):
            heard.append(evaluation)

    held_out = {"val": tiny_dataset(seed=9), "probe": tiny_dataset()}
    trainer = Trainer(
        tiny_model(), tiny_dataset(), SMALL, evaluate=evaluate, validation=held_out, callbacks=[Listener()]
    )
    last = trainer.fit().evaluations[-1]
    assert set(last["metrics"]) == {"val_loss", "probe_loss", "gap"}
    assert last["metrics"]["gap"] == last["metrics"]["val_loss"] - last["metrics"]["probe_loss"]
    assert heard[-1]["samples"] == ["text"]
    assert "samples" not in last, "texts would grow the state of every checkpoint"


def test_training_is_the_same_with_and_without_it(tiny_model, tiny_dataset):
    watched, alone = tiny_model(dropout=0.5), tiny_model(dropout=0.5)
    Trainer(watched, tiny_dataset(), SMALL, validation={"val": tiny_dataset(seed=9)}).fit()
    Trainer(alone, tiny_dataset(), SMALL).fit()
    assert weights(watched) == weights(alone)
    assert watched.training


def test_the_best_checkpoint_outlives_the_rotation(tiny_model, tiny_dataset, tmp_path):
    """Random data cannot be generalised: the loss on other data is lowest early."""
    config = TrainingConfig(max_epochs=12, batch_size=8, learning_rate=5e-2)
    state = Trainer(
        tiny_model(),
        tiny_dataset(),
        config,
        validation={"val": tiny_dataset(seed=9)},
        run_dir=tmp_path,
        checkpoint=CheckpointConfig(keep_last=2),
    ).fit()
    losses = {e["step"]: e["metrics"]["val_loss"] for e in state.evaluations}
    best = min(losses, key=losses.__getitem__)
    assert best < 50, "the test needs an early best"
    assert (state.best_step, state.best_loss) == (best, losses[best])
    assert [step for step, _ in list_checkpoints(tmp_path / "checkpoints")] == [best, 55, 60]


@pytest.mark.parametrize("number", range(1, 6))
def test_a_run_stopped_in_it_validates_after_the_resume_and_ends_the_same(tiny_model, tiny_dataset, tmp_path, number):
    """Five batches: the signal comes before each of them in turn. Their dataset draws from the global generators."""
    held_out = tiny_dataset(seed=9)

    class Stopping:
        calls = 0

        def __len__(self):
            return len(held_out)

        def __getitems__(self, ids):
            torch.rand(1)
            Stopping.calls += 1
            if Stopping.calls == number:
                os.kill(os.getpid(), signal.SIGUSR1)
            return [held_out[int(i)] for i in ids]

    def make(directory, validation):
        return Trainer(
            tiny_model(dropout=0.3), tiny_dataset(), SMALL, validation={"val": validation}, run_dir=tmp_path / directory
        )

    with pytest.raises(Preempted) as stopped:
        make("a", Stopping()).fit()
    assert stopped.value.step == 5
    resumed, undisturbed = make("a", held_out).fit(), make("b", held_out).fit()
    assert resumed.evaluations == undisturbed.evaluations
    assert resumed.train_loss == undisturbed.train_loss
    assert (resumed.best_step, resumed.best_loss) == (undisturbed.best_step, undisturbed.best_loss)


def test_other_data_than_the_checkpoint_saw_is_refused_naming_both(tiny_model, tiny_dataset, tmp_path):
    def make(epochs, digest):
        config = TrainingConfig(max_epochs=epochs, batch_size=8)
        digests = {"corpus": "a" * 64, "tokens": digest}
        return Trainer(
            tiny_model(),
            tiny_dataset(),
            config,
            run_dir=tmp_path,
            services=Services(data_digests=digests, config_hash="the same"),
        )

    make(1, "b" * 64).fit()
    with pytest.raises(CheckpointError) as caught:
        make(2, "c" * 64).fit()
    assert f"the tokens with SHA-256 {'b' * 64}" in str(caught.value)
    assert f"here is the tokens with SHA-256 {'c' * 64}" in str(caught.value)
    assert make(2, "b" * 64).fit().step == 10


SCRIPT = """
import json, os, signal
import torch
from accel_train.config.sections import TrainingConfig
from accel_train.training.trainer import Trainer
from accel_train.errors import Preempted
rank = int(os.environ["RANK"])
torch.manual_seed(0)
tokens = torch.randint(0, 11, (39, 6))
pairs = [(row[:-1], row[1:]) for row in tokens]
train, held_out = pairs[:24], pairs[24:]
class HeldOut:
    calls = 0
    def __len__(self):
        return len(held_out)
    def __getitems__(self, ids):
        HeldOut.calls += 1
        if os.environ.get("STOP") == f"{rank}/{HeldOut.calls}":
            os.kill(os.getpid(), signal.SIGUSR1)
        return [held_out[int(i)] for i in ids]
model = torch.nn.Sequential(torch.nn.Embedding(11, 8), torch.nn.Dropout(0.0), torch.nn.Linear(8, 11))
config = TrainingConfig(max_epochs=2, batch_size=6, learning_rate=1e-2)
trainer = Trainer(model, train, config, validation={"val": HeldOut()}, run_dir=os.environ["RUN_DIR"])
try:
    state = trainer.fit()
    print(json.dumps({"losses": [e["metrics"]["val_loss"] for e in state.evaluations], "best": state.best_step}))
except Preempted as preempted:
    print(json.dumps({"stopped": preempted.step}))
trainer.accelerator.end_training()
"""


def on_ranks(world: int, directory, **env: str) -> list[dict]:
    chosen = {"ACCELERATE_USE_CPU": "true", "RUN_DIR": str(directory), **env}
    return [lines[0] for lines in finish(start_ranks(SCRIPT, world, **chosen))]


def test_it_does_not_depend_on_the_number_of_processes(tmp_path):
    """Three batches, the last one short: of two ranks one has nothing to count in the second round."""
    alone, pair = (on_ranks(world, tmp_path / f"{world}") for world in (1, 2))
    assert pair[0] == pair[1], "every rank has the same losses"
    assert pair[0]["losses"] == pytest.approx(alone[0]["losses"], rel=1e-5)
    assert len(alone[0]["losses"]) == 2


def test_a_signal_to_one_rank_in_the_middle_of_it_stops_both(tmp_path):
    assert on_ranks(2, tmp_path, STOP="1/1") == [{"stopped": 4}] * 2
