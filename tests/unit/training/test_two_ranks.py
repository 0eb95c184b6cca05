"""The loop on two ranks: nobody decides alone."""

from __future__ import annotations

import pytest
from rank_processes import finish, start_ranks

PRELUDE = """
import json, os
import torch
from accel_train.config.sections import TrainingConfig
from accel_train.training.losses import next_token_cross_entropy
from accel_train.training.trainer import Trainer
from accel_train.errors import NonFinite
rank = int(os.environ["RANK"])
torch.manual_seed(0)
tokens = torch.randint(0, 11, (40, 6))
dataset = [(row[:-1], row[1:]) for row in tokens]
model = torch.nn.Sequential(torch.nn.Embedding(11, 8), torch.nn.Linear(8, 11))
def report(**values):
    print(json.dumps(values), flush=True)
"""
END = "trainer.accelerator.end_training()\n"
CPU = {"ACCELERATE_USE_CPU": "true"}


def test_the_verdict_that_only_the_main_process_can_compute_stops_all() -> None:
    body = """
def evaluate(model, state, should_stop):
    assert rank == 0, "only the main process judges"
    return {"passed": state.step >= 10, "stop": state.step >= 10}
trainer = Trainer(model, dataset, TrainingConfig(max_epochs=9, batch_size=8), evaluate=evaluate)
state = trainer.fit()
report(step=state.step, stopped=state.stopped, evaluations=[e["passed"] for e in state.evaluations])
"""
    outputs = finish(start_ranks(PRELUDE + body + END, 2, **CPU))
    assert outputs == [[{"step": 10, "stopped": True, "evaluations": [False, True]}]] * 2


def test_a_commit_that_fails_on_the_main_process_ends_both_at_the_next_step(tmp_path) -> None:
    """The other rank learns why, although no save or evaluation is near."""
    body = f"""
import threading, time
from accel_train.config.sections import CheckpointConfig
from accel_train.checkpoints import manifest
from accel_train.training.callbacks import Callback
from accel_train.errors import PeerFailed
from accel_train.errors import CheckpointError
failed = threading.Event()
def full(path, header):
    failed.set()
    raise OSError(28, "No space left on device")
manifest.write_manifest = full
class Slowly(Callback):
    def on_step_end(self, state):
        failed.wait(30) if rank == 0 and state.step == 11 else time.sleep(0.01)
config, saving = TrainingConfig(max_epochs=1, batch_size=2), CheckpointConfig(every_steps=10)
trainer = Trainer(model, dataset, config, run_dir={str(tmp_path)!r}, checkpoint=saving, callbacks=[Slowly()])
try:
    trainer.fit()
except (CheckpointError, PeerFailed) as error:
    report(kind=type(error).__name__, step=trainer.state.step, told="No space left" in str(error))
"""
    first, second = finish(start_ranks(PRELUDE + body + END, 2, **CPU))
    assert (first[0]["kind"], second[0]["kind"]) == ("CheckpointError", "PeerFailed")
    assert first[0]["told"]
    assert second[0]["told"]
    assert first[0]["step"] == second[0]["step"] <= 15


@pytest.mark.parametrize("poison", ["loss * torch.nan", "loss + torch.inf"])
def test_a_bad_loss_on_one_rank_stops_both_at_its_step(poison: str) -> None:
    """An infinite constant leaves this rank's own gradients finite: only the agreement shows it to the other."""
    body = f"""
def loss_fn(model, batch):
    loss = next_token_cross_entropy(model, batch)
    return {poison} if rank == 1 and trainer.state.step >= 6 else loss
trainer = Trainer(model, dataset, TrainingConfig(max_epochs=9, batch_size=8), loss_fn=loss_fn)
try:
    trainer.fit()
except NonFinite as error:
    finite = all(bool(p.isfinite().all()) for p in model.parameters())
    report(step=error.step, losses=len(trainer.state.train_loss), where=error.where, finite=finite)
"""
    first, second = finish(start_ranks(PRELUDE + body + END, 2, **CPU))
    assert first == second
    assert (first[0]["step"], first[0]["losses"]) == (7, 6)
    assert first[0]["finite"]
    assert first[0]["where"].endswith("on rank 1")
