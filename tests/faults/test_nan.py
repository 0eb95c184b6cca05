"""A number that is not finite on one rank: all stop at its step, name it, and nothing of it is ever saved."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from faults import (
    EVERY,
    check_finished_like,
    check_intact,
    configured,
    slow,
    start_ranks,
    train,
    undisturbed,
)
from harness import ROOT, checkpoints, record, run_dir
from poison import PARAMETER
from safetensors.torch import load_file

from accel_train.checkpoints.manifest import verify

sys.path.insert(0, str(ROOT / "tests" / "unit"))
import rank_processes

POISONED = {"hooks": {"update": ["poison:from_environment"]}}
STEP = 26
"""Updates made when the poison is there: a multiple of the interval of saves follows at once."""
NAMED = {"parameter": f"parameter {PARAMETER}", "loss": "loss"}


def check_last_good(results: Path, step: int) -> None:
    """The newest checkpoint is the last one before the fault, sound and finite."""
    check_intact(results)
    newest = checkpoints(results)[-1]
    assert newest.name == f"step_{step:07d}"
    assert verify(newest) == []
    assert not list(newest.parent.glob(".tmp-*"))
    check_finite(newest)


def check_finite(checkpoint: Path) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    moments = torch.load(checkpoint / "optimizer.bin", weights_only=True)["state"]
    assert weights
    assert moments
    for name, tensor in [*weights.items(), *((str(i), t) for i, state in moments.items() for t in state.values())]:
        assert tensor.isfinite().all(), name
    assert load_file(checkpoint / "losses.safetensors")["train_loss"].isfinite().all()


def check_failed(results: Path, world: int, step: int, where: str) -> None:
    """The record and the log of every rank tell of the same step (1-based) and tensor."""
    found = record(results)
    assert found["status"] == "failed"
    sentence = re.search(
        r"training stopped at step \d+: the loss or a gradient is not finite; first: .*? on rank \d", found["reason"]
    )
    assert sentence, found["reason"]
    assert f"at step {step}:" in sentence[0]
    assert re.search(rf"first: {where}$", sentence[0]), sentence[0]
    assert len(found["curves"]["train_loss"]) == step - 1
    for rank in range(world):
        log = (run_dir(results) / "logs" / f"rank_{rank}.log").read_text()
        assert log.count(sentence[0]) == 1, f"rank {rank} stopped elsewhere: {log}"


CASES = [
    (kind, rank, world, launcher)
    for kind in NAMED
    for rank, world, launcher in ((0, 1, False), (0, 2, True), (1, 2, False), (2, 3, False))
]
QUICK = {("parameter", 0, 1, False)}


@pytest.mark.parametrize(
    ("kind", "rank", "world", "launcher"), [pytest.param(*c, marks=() if c in QUICK else slow) for c in CASES]
)
def test_poison_on_one_rank_stops_all_at_its_step_and_the_run_can_go_on_without_it(
    tmp_path: Path, kind: str, rank: int, world: int, launcher: bool
) -> None:
    config, results = configured(tmp_path, POISONED)
    mark = tmp_path / "poisoned"
    # The hook of update 25 (0-based) spoils what the next step computes with.
    poison = json.dumps({"kind": kind, "step": STEP - 1, "rank": rank, "mark": str(mark)})
    if launcher:
        train(config, world, expect=1, fresh=True, POISON=poison)
    else:
        processes = start_ranks(config, world, POISON=poison)
        outputs = [process.communicate(timeout=90)[0] for process in processes]
        assert [process.returncode for process in processes] == [1] * world, outputs
    assert mark.exists()

    check_failed(results, world, STEP + 1, re.escape(f"{NAMED[kind]} on rank {rank}"))
    check_last_good(results, STEP // EVERY * EVERY)
    train(config, world)
    check_finished_like(results, undisturbed(world, tmp_path, POISONED))


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_an_absurd_learning_rate_stops_all_ranks_and_relaunching_changes_nothing(tmp_path: Path, world: int) -> None:
    # Weight decay times this rate is 30: the weights alternate in sign and grow 29-fold with every step.
    absurd = {"training": {"learning_rate": 3000.0, "warmup_steps": 0}}
    config, results = configured(tmp_path, absurd)
    train(config, world, expect=1)
    found = record(results)
    step = len(found["curves"]["train_loss"]) + 1
    assert step > EVERY, "there is a checkpoint to keep"
    check_failed(results, world, step, r"(parameter|activation of|gradient of|loss).* on rank 0")
    check_last_good(results, (step - 1) // EVERY * EVERY)
    before = {path: path.read_bytes() for path in checkpoints(results)[-1].iterdir()}

    train(config, world, expect=1)
    assert record(results)["status"] == "failed"
    assert len(record(results)["curves"]["train_loss"]) == step - 1
    assert {path: path.read_bytes() for path in checkpoints(results)[-1].iterdir()} == before


LIBRARY = """
import json, os, sys
from pathlib import Path
import torch
from accel_train.config.sections import CheckpointConfig, TrainingConfig
from accel_train.errors import NonFinite
from accel_train.training.plan import Plan
from accel_train.training.trainer import Trainer
rank, world, step = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ["BAD_STEP"])
config = TrainingConfig(max_epochs=3, batch_size=8, learning_rate=0.01)
torch.manual_seed(0)
inputs = torch.randn(80, 5)
targets = inputs.sum(1, keepdim=True)
if step >= 0:
    # One number of the sample that rank 1 takes first at that step.
    batches = iter(Plan(config, 80, world, rank, 42).sampler())
    ids = [next(batches) for _ in range(step + 1)][-1]
    inputs[ids[len(ids) // world], 3] = torch.nan
model = torch.nn.Sequential(torch.nn.Linear(5, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
def loss_fn(model, batch):
    return torch.nn.functional.mse_loss(model(batch[0]), batch[1])
trainer = Trainer(
    model, list(zip(inputs, targets)), config, loss_fn=loss_fn,
    run_dir=os.environ["RUN_DIR"], checkpoint=CheckpointConfig(every_steps=3),
)
try:
    state = trainer.fit()
    print(json.dumps({"step": state.step, "fingerprint": state.fingerprint_hex, "losses": state.train_loss}))
except NonFinite as error:
    print(json.dumps({"stopped": error.step, "where": error.where}))
trainer.accelerator.end_training()
"""


@pytest.mark.slow
def test_a_bad_sample_stops_both_ranks_at_its_step_and_a_mended_dataset_goes_on(tmp_path: Path) -> None:
    def fit(directory: Path, bad_step: int) -> list[list[dict]]:
        env = {"BAD_STEP": str(bad_step), "RUN_DIR": str(directory), "ACCELERATE_USE_CPU": "true"}
        return rank_processes.finish(rank_processes.start_ranks(LIBRARY, 2, **env))

    first, second = fit(tmp_path / "run", 7)
    assert first == second == [{"stopped": 8, "where": "activation of 0 on rank 1"}]
    saved = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert [path.name for path in saved] == ["step_0000003", "step_0000006"]
    assert verify(saved[-1]) == []
    check_finite(saved[-1])

    mended = fit(tmp_path / "run", -1)
    assert mended == fit(tmp_path / "undisturbed", -1)
    assert mended[0][0]["step"] == 30
    final, expected = ((tmp_path / name / "checkpoints" / "step_0000030") for name in ("run", "undisturbed"))
    assert (final / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
