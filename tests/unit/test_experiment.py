"""One run in this process: what the configuration switches on is there, and nothing else changes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from accel_train.config import (
    ExperimentConfig,
    GateConfig,
    GraphConfig,
    HooksConfig,
    ModelConfig,
    RulesConfig,
    TrackingConfig,
    TrainingConfig,
    WalksConfig,
    run_directory,
)
from accel_train.experiment import run
from accel_train.training.checkpoint import list_checkpoints

TINY = ExperimentConfig(
    graph=GraphConfig(n=20, K=2, p_in=0.6, p_out=0.3),
    rules=RulesConfig(jumpers_per_block=1, jump_lengths=(2, 3)),
    walks=WalksConfig(num_walks=64, walk_length=17),
    model=ModelConfig(d_model=16, n_layers=1, n_heads=2, max_seq_len=16, dropout=0.1),
    training=TrainingConfig(batch_size=16, max_epochs=2, log_interval=2, learning_rate=3e-3),
    gate=GateConfig(num_sequences=30, prompt_length=4, min_rule_checks=5, stop_on_pass=False),
)


def finished(tmp_path: Path, **changes: Any) -> tuple[Path, dict[str, Any]]:
    config = dataclasses.replace(TINY, output_dir=str(tmp_path), **changes)
    assert run(config, command=["test"]) == 0
    directory = run_directory(config)
    return directory, json.loads((directory / "result.json").read_text())


def weights(directory: Path) -> bytes:
    return (list_checkpoints(directory / "checkpoints")[-1][1] / "model.safetensors").read_bytes()


def test_the_same_configuration_and_seed_give_the_same_bits(tmp_path):
    first, one = finished(tmp_path / "a")
    second, two = finished(tmp_path / "b")
    assert weights(first) == weights(second)
    assert one["curves"] == two["curves"]
    other, _ = finished(tmp_path / "c", seed=7)
    assert weights(other) != weights(first)


def test_hooks_observe_without_changing_a_bit_and_stand_in_the_record(tmp_path):
    plain, _ = finished(tmp_path / "a")
    hooked, record = finished(tmp_path / "b", hooks=HooksConfig(forward=("activation_stats",), update=("identity",)))
    assert weights(plain) == weights(hooked)
    assert record["provenance"]["hook_list"] == ["activation_stats", "identity"]
    lines = [json.loads(line) for line in (hooked / "metrics.jsonl").read_text().splitlines()]
    assert any("activations/" in key for key in lines[0])
    assert hooked.name != plain.name, "the hash covers the hooks"


def test_trackers_get_every_log_line(tmp_path):
    directory, _ = finished(tmp_path, tracking=TrackingConfig(log_with=("tensorboard",), project="here"))
    events = list(directory.rglob("events.out.tfevents*"))
    assert events
    assert any(path.stat().st_size > 500 for path in events)


@pytest.mark.parametrize("interval", [3])
def test_a_gate_judged_every_few_steps_has_one_value_per_evaluation(tmp_path, interval):
    training = dataclasses.replace(TINY.training, eval_interval=interval)
    _, record = finished(tmp_path, training=training)
    # Eight steps: evaluations after 3 and 6, and the final one.
    assert len(record["curves"]["edge_compliance"]) == 3
    assert len(record["curves"]["train_loss"]) == 8


def test_the_checkpoint_that_passed_is_kept_beside_the_last_ones(tmp_path):
    lenient = dataclasses.replace(TINY.gate, edge_threshold=0.0, rule_threshold=0.0)
    training = dataclasses.replace(TINY.training, max_epochs=6)
    directory, record = finished(tmp_path, gate=lenient, training=training)
    assert record["gate"]["passed"]
    assert [step for step, _ in list_checkpoints(directory / "checkpoints")] == [4, 16, 20, 24]


def test_a_passed_gate_ends_training_at_once(tmp_path):
    lenient = dataclasses.replace(TINY.gate, edge_threshold=0.0, rule_threshold=0.0, stop_on_pass=None)
    _, record = finished(tmp_path, gate=lenient)
    assert record["metrics"]["scalars"]["epochs_trained"] == 1
    assert record["gate"]["epoch"] == 1
