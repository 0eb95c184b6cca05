"""One run in this process: what the configuration switches on is there, and nothing else changes."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from configs import experiment_config
from torch import nn

from accel_train.checkpoints.manifest import list_checkpoints
from accel_train.config.identity import config_hash
from accel_train.config.sections import HooksConfig, ModelConfig, StartConfig, TrackingConfig, TrainingConfig
from accel_train.errors import ConfigError, Interrupted
from accel_train.process.work import SILENT
from accel_train.runs import experiment
from accel_train.runs.directory import CONFIG_FILE, read_config, run_directory
from accel_train.runs.experiment import epoch_means, judged, run
from accel_train.runs.initial_weights import resolve_weights
from accel_train.runs.listing import load_sufficient_runs
from accel_train.runs.record import record_schema
from accel_train.runs.recorder import Recorder
from accel_train.tasks.base import Evaluation
from accel_train.tasks.criteria import Criterion, judge
from accel_train.tasks.walks.config import GateConfig, GraphConfig, RulesConfig, WalksConfig
from accel_train.tasks.walks.task import WalksTask

WALKS = WalksConfig(
    num_walks=64,
    walk_length=17,
    graph=GraphConfig(n=20, K=2, p_in=0.6, p_out=0.3),
    rules=RulesConfig(jumpers_per_block=1, jump_lengths=(2, 3)),
    gate=GateConfig(num_sequences=30, prompt_length=4, min_rule_checks=5, stop_on_pass=False),
)
TINY = experiment_config(
    walks=WALKS,
    model=ModelConfig(d_model=16, n_layers=1, n_heads=2, max_seq_len=16, dropout=0.1),
    training=TrainingConfig(batch_size=16, max_epochs=2, log_interval=2, learning_rate=3e-3),
)


def lenient(**gate: Any) -> WalksConfig:
    """A gate that every model passes."""
    return dataclasses.replace(
        WALKS, gate=dataclasses.replace(WALKS.gate, edge_threshold=0.0, rule_threshold=0.0, **gate)
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


def test_the_record_of_a_missed_gate_follows_its_schema(tmp_path):
    """The contract (D9, D11, C10) on a record that a real run wrote."""
    directory, record = finished(tmp_path)
    jsonschema.Draft202012Validator(record_schema()).validate(record)
    assert (record["status"], record["gate"]["passed"]) == ("completed", False)
    missed = [row["metric"] for row in record["gate"]["criteria"] if not row["passed"]]
    assert missed
    assert all(metric in record["gate"]["failure_reason"] for metric in missed)
    assert record["metrics"]["scalars"]["final_rule_compliance"] == record["curves"]["rule_compliance"][-1]
    assert {name: len(record["curves"][name]) for name in ("train_loss", "edge_compliance", "rule_compliance")} == {
        "train_loss": 8,
        "edge_compliance": 2,
        "rule_compliance": 2,
    }
    assert record["config_hash"] == config_hash(read_config(directory / CONFIG_FILE))
    assert load_sufficient_runs(tmp_path) == []


def test_the_record_of_a_passed_gate_follows_its_schema(tmp_path):
    _, record = finished(tmp_path, walks=lenient())
    jsonschema.Draft202012Validator(record_schema()).validate(record)
    assert [found["run_id"] for found in load_sufficient_runs(tmp_path)] == [record["run_id"]]


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
    training = dataclasses.replace(TINY.training, max_epochs=6)
    directory, record = finished(tmp_path, walks=lenient(), training=training)
    assert record["gate"]["passed"]
    assert [step for step, _ in list_checkpoints(directory / "checkpoints")] == [4, 16, 20, 24]


def test_a_passed_gate_ends_training_at_once(tmp_path):
    _, record = finished(tmp_path, walks=lenient(stop_on_pass=True))
    assert record["metrics"]["scalars"]["epochs_trained"] == 1
    assert record["gate"]["epoch"] == 1


def test_a_figure_that_cannot_be_drawn_does_not_keep_a_run_from_ending(tmp_path):
    config = dataclasses.replace(TINY, output_dir=str(tmp_path))
    directory = run_directory(config)
    directory.mkdir(parents=True)
    (directory / "figures").write_text("in the way")
    assert run(config) == 0
    assert json.loads((directory / "result.json").read_text())["status"] == "completed"


def test_weights_to_start_from_must_not_change_underneath(tmp_path):
    source, _ = finished(tmp_path)
    record = json.loads((source / "result.json").read_text())
    (source / "result.json").write_text(json.dumps({**record, "status": "running"}))
    with pytest.raises(ConfigError, match="is a run that is not completed"):
        resolve_weights(dataclasses.replace(TINY, start=StartConfig(weights=str(source))))


def test_a_named_run_goes_on_when_its_source_is_gone(tmp_path):
    source, _ = finished(tmp_path)
    started_from = StartConfig(weights=str(source))
    named, first = finished(tmp_path, name="second", start=started_from)
    shutil.rmtree(source)
    (named / "result.json").write_text(json.dumps({**first, "status": "preempted"}))
    _, again = finished(tmp_path, name="second", start=started_from)
    assert again["config_hash"] == first["config_hash"]
    assert again["provenance"]["init_digest"] == first["provenance"]["init_digest"]


def test_an_evaluation_done_twice_stands_once_in_the_log(tmp_path, monkeypatch):
    """Preempted in the evaluation, then killed after it was done again: the third launch does it anew."""
    config = dataclasses.replace(TINY, output_dir=str(tmp_path))
    directory = run_directory(config)
    evaluate = WalksTask.evaluate

    def interrupted(task, model, losses, work):
        os.kill(os.getpid(), signal.SIGTERM)
        assert work.should_stop()
        raise Interrupted("stopped")

    monkeypatch.setattr(WalksTask, "evaluate", interrupted)
    assert run(config) == 75
    monkeypatch.setattr(WalksTask, "evaluate", evaluate)

    class Killed(BaseException):
        pass

    def killed(keeper, state):
        raise Killed

    monkeypatch.setattr(Recorder, "on_epoch_end", killed)
    with pytest.raises(Killed):
        run(config)
    monkeypatch.undo()
    assert run(config) == 0
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "gate_passed" in line] == [4, 8]


def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_written(tmp_path):
    config = dataclasses.replace(TINY, output_dir=str(tmp_path / "out"), tracking=TrackingConfig(log_with=("wandb",)))
    if importlib.util.find_spec("wandb") is not None:
        pytest.skip("wandb is installed")
    with pytest.raises(ConfigError, match=r"tracking\.log_with: 'wandb' is not installed"):
        run(config)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("learning_rate", math.inf),
        ("timeout_seconds", math.inf),
        ("betas", (0.9, math.nan)),
        ("weight_decay", math.inf),
    ],
)
def test_a_number_that_is_not_finite_is_refused(field, value):
    with pytest.raises(ConfigError, match=rf"training\.{field}"):
        dataclasses.replace(TINY, training=dataclasses.replace(TINY.training, **{field: value}))


@pytest.mark.parametrize("name", ["a/b", ".lock", " ", "x.archived-1", "a\nb", "n" * 201, "corpora"])
def test_a_name_that_is_no_plain_directory_is_refused(name):
    with pytest.raises(ConfigError, match="name: "):
        dataclasses.replace(TINY, name=name)


def test_a_pass_before_the_last_epoch_stays_in_the_record(tmp_path, monkeypatch):
    """Training goes on after it, and the last verdict is another."""
    evaluate = WalksTask.evaluate
    verdicts = iter([True, False])

    def alternating(task, *arguments):
        verdict = evaluate(task, *arguments).verdict
        return Evaluation(dataclasses.replace(verdict, passed=next(verdicts), failure_reason=None))

    monkeypatch.setattr(WalksTask, "evaluate", alternating)
    _, record = finished(tmp_path)
    assert not record["gate"]["passed"]
    assert record["gate"]["first_passed_epoch"] == 1


# -- the verdict ---------------------------------------------------------------------------


class Known:
    """A task whose model scores what it is told to."""

    def __init__(self, score, stops=True):
        self.score, self.stops_on_pass = score, stops

    def evaluate(self, model, losses, work):
        return Evaluation(judge([Criterion("score", ">", 0.5)], {"score": self.score}))


@pytest.mark.parametrize(("score", "stops", "stop"), [(0.9, True, True), (0.9, False, False), (0.1, True, False)])
def test_training_stops_on_a_pass_where_the_task_says_so(score, stops, stop):
    found = judged(Known(score, stops), nn.Linear(1, 1), {}, SILENT)
    assert (found["passed"], found["stop"]) == (score > 0.5, stop)


def test_an_evaluation_without_a_verdict_never_stops_training():
    class Unjudged(Known):
        def evaluate(self, model, losses, work):
            return Evaluation(None, {"val_loss": losses["val"]})

    found = judged(Unjudged(0.9), nn.Linear(1, 1), {"val": 2.5}, SILENT)
    assert found == {"metrics": {"val_loss": 2.5}, "stop": False}


def test_the_last_evaluation_stands_without_a_conclusion(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(WalksTask, "conclude", lambda task, trained, work: seen.append(trained))
    directory, record = finished(tmp_path)
    [trained] = seen
    assert trained.evaluation["criteria"] == record["gate"]["criteria"]
    assert trained.epoch_losses == epoch_means(record["curves"]["train_loss"], 4)
    assert trained.checkpoint == directory / "checkpoints" / "step_0000008"


def test_a_conclusion_is_the_verdict_of_the_record(tmp_path, monkeypatch):
    concluded = Evaluation(judge([Criterion("cost", "<", 1.0)], {"cost": 2.0}), samples=["a sample"])
    monkeypatch.setattr(WalksTask, "conclude", lambda task, trained, work: concluded)
    directory, record = finished(tmp_path)
    assert [row["metric"] for row in record["gate"]["criteria"]] == ["cost"]
    assert (directory / "samples" / "validation.txt").read_text() == "a sample\n"


@pytest.mark.parametrize(
    ("losses", "per_epoch", "means"), [([1.0, 3.0, 5.0], 2, [2.0]), ([], 2, []), ([1.0, 2.0], 1, [1.0, 2.0])]
)
def test_epoch_means_are_those_of_whole_epochs(losses, per_epoch, means):
    assert epoch_means(losses, per_epoch) == means


@pytest.mark.parametrize(
    ("backend", "code", "ends"),
    [
        ("gloo", 1, "orderly"),
        ("gloo", None, "orderly"),
        ("nccl", 0, "orderly"),
        ("nccl", 75, "orderly"),
        ("nccl", 1, "at once"),
        ("nccl", None, None),
    ],
)
def test_a_failed_rank_does_not_wait_for_collectives_of_a_gpu(backend, code, ends, monkeypatch):
    """Under NCCL an orderly end waits for what a rank that failed never answers."""
    seen = []
    monkeypatch.setattr(experiment.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(experiment.dist, "get_backend", lambda: backend)
    monkeypatch.setattr(experiment.dist, "destroy_process_group", lambda: seen.append("orderly"))
    monkeypatch.setattr(experiment.os, "_exit", lambda left_with: seen.append("at once") or seen.append(left_with))
    experiment._end_process_group(code)
    assert seen == ([] if ends is None else ["at once", code] if ends == "at once" else ["orderly"])
