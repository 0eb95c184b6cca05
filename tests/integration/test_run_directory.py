"""What a run leaves behind, and what the next command makes of it."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from harness import ROOT, TINY, Shown, checkpoints, command, environment, metrics, record, run_dir, write_config

from accel_train.checkpoints.manifest import read_manifest, verify
from accel_train.config.sections import TrainingConfig
from accel_train.errors import PeerFailed
from accel_train.process.work import SILENT
from accel_train.runs.listing import load_sufficient_runs
from accel_train.runs.record import record_schema as load_schema
from accel_train.runs.use import find_run, load_model
from accel_train.tasks.registry import build_task
from accel_train.tasks.walks.dataset import WalkDataset
from accel_train.training.losses import next_token_cross_entropy
from accel_train.training.plan import Plan
from accel_train.training.trainer import Trainer

QUICK: dict[str, Any] = {"training": {"max_epochs": 2}, "checkpoint": {"every_steps": None}}
LENIENT: dict[str, Any] = {"walks": {"gate": {"edge_threshold": 0.0, "rule_threshold": 0.0, "min_rule_checks": 0}}}
POLITE: dict[str, Any] = {"hooks": {"update": ["killing:politely"]}}


@pytest.fixture
def train(tmp_path: Path, here):
    """``train(layer, ..., options=[...])``: the tiny configuration with changes, into ``tmp_path / "results"``."""

    def train(*layers: dict[str, Any], options: Sequence[object] = (), results: Path = tmp_path / "results") -> Shown:
        config = write_config(tmp_path / "c.yaml", TINY, QUICK, *layers, {"output_dir": str(results)})
        return here("train", "--config", config, *options)

    return train


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return tmp_path / "results"


def tree(directory: Path) -> dict[str, bytes]:
    """Every file under a directory but the lock's, with its content."""
    files = [path for path in sorted(directory.rglob("*")) if path.is_file() and not path.name.startswith(".lock")]
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def validate(found: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator(load_schema()).validate(found)


# -- the record ----------------------------------------------------------------------------


def test_a_finished_run_leaves_a_complete_record(train, results: Path) -> None:
    hooks = {"hooks": {"forward": ["activation_stats"], "update": ["identity"]}}
    labels = {"description": "a test", "tags": ["tiny", "ümlaut"]}
    shown = train(hooks, labels)
    assert (shown.code, shown.err) == (0, "")
    found, directory = record(results), run_dir(results)
    validate(found)

    assert (found["status"], found["reason"]) == ("completed", None)
    assert (found["description"], found["tags"]) == ("a test", ["tiny", "ümlaut"])
    assert found["created_at"] <= found["finished_at"]
    assert directory.name == found["experiment_id"]
    assert found["experiment_id"].endswith(found["config_hash"][:8])
    assert found["config"]["training"]["max_epochs"] == 2

    curves, scalars, gate = found["curves"], found["metrics"]["scalars"], found["gate"]
    assert [len(curves[name]) for name in ("train_loss", "edge_compliance", "rule_compliance")] == [40, 2, 2]
    assert curves["train_loss"][0] == pytest.approx(np.log(20), abs=0.2), "a fresh model knows nothing"
    assert scalars["final_train_loss"] == curves["train_loss"][-1] < curves["train_loss"][0]
    assert (scalars["epochs_trained"], scalars["steps_trained"], scalars["tokens_seen"]) == (2, 40, 40 * 12 * 16)
    assert scalars["gate_passed"] is False

    assert (gate["passed"], gate["epoch"]) == (False, 2)
    assert "too few rule checks" in gate["failure_reason"] or "compliance is" in gate["failure_reason"]
    assert [(row["metric"], row["threshold"]) for row in gate["criteria"]] == [
        ("edge_compliance", 0.95),
        ("rule_compliance", 0.8),
    ]
    assert gate["criteria"][0]["value"] == curves["edge_compliance"][-1] == scalars["final_edge_compliance"]
    evidence = gate["evidence"]
    assert evidence["edge_checks"] == 40 * 13  # 40 sequences, 4 of their 17 tokens given
    assert evidence["edge_interval"][0] <= evidence["edge_compliance"] <= evidence["edge_interval"][1]
    assert 1 <= evidence["distinct_sequences"] <= 40
    assert evidence["rule_checks"] == sum(rule["checks"] for rule in evidence["rules"])
    assert evidence["rule_blind"]["edge_compliance"] == 1.0
    assert evidence["sampled"]["edge_checks"] == 40 * 13
    assert gate["preflight"]["corpus"]["rule_compliance"] == 1.0

    provenance, head = found["provenance"], _git_head()
    assert provenance["git_commit"] == head
    assert provenance["hook_list"] == ["activation_stats", "identity"]
    assert provenance["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert provenance["command"][:2] == ["accel-train", "train"]
    assert (provenance["world_sizes"], provenance["resumes"], provenance["launches"]) == ([1], [], 1)
    assert int(provenance["data_fingerprint"], 16) > 0
    assert provenance["machine"]["device"] == "cpu"

    seconds = found["timing"]["seconds"]
    phases = {name: value for name, value in seconds.items() if name != "total"}
    assert {"corpus", "preflight", "start", "training", "evaluation", "checkpoint"} <= set(phases)
    assert all(value > 0 for value in phases.values())
    assert sum(phases.values()) <= seconds["total"]
    rate = scalars["tokens_seen"] / seconds["training"]
    assert found["timing"]["tokens_per_second"] == pytest.approx(rate, rel=1e-6)

    for line in metrics(results):
        identity = {name: line[name] for name in ("run_id", "config_hash", "git_commit")}
        assert identity == {"run_id": found["run_id"], "config_hash": found["config_hash"], "git_commit": head}
    assert [line["step"] for line in metrics(results) if "loss" in line] == list(range(4, 41, 4))
    assert [line["step"] for line in metrics(results) if "edge_compliance" in line] == [20, 40]
    assert {"lr", "grad_norm", "tokens_per_second", "activations/blocks.0/mean"} <= set(metrics(results)[0])
    figure = (directory / "figures" / "training_curves.png").read_bytes()
    assert figure.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(figure) > 10_000
    assert {path.name for path in directory.iterdir()} >= {"config.yaml", "checkpoints", "logs"}


def _git_head() -> str | None:
    done = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def test_a_preempted_run_says_so_and_goes_on_under_other_neutral_fields(train, results: Path, monkeypatch) -> None:
    monkeypatch.setenv("STOP_AT_STEP", "25")
    shown = train(POLITE)
    assert shown.code == 75
    assert shown.lines("preempted") == ["stopped after step 26 (SIGTERM); run the same command again to continue"]
    found = record(results)
    validate(found)
    assert (found["status"], found["finished_at"]) == ("preempted", None)
    assert "SIGTERM" in found["reason"]
    assert (len(found["curves"]["train_loss"]), len(found["curves"]["edge_compliance"])) == (26, 1)

    monkeypatch.delenv("STOP_AT_STEP")
    shown = train(POLITE, {"training": {"log_interval": 5}, "tags": ["again"]})
    assert shown.code == 0
    assert shown.lines("training")[0].startswith("resumed after step 26")
    after = record(results)
    validate(after)
    assert (after["status"], after["reason"], after["run_id"]) == ("completed", None, found["run_id"])
    assert after["provenance"]["resumes"][0]["step"] == 26
    assert (after["provenance"]["launches"], after["tags"]) == (2, ["again"])
    assert [line["step"] for line in metrics(results) if "loss" in line] == [*range(4, 25, 4), 30, 35, 40]
    assert after["timing"]["seconds"]["total"] > found["timing"]["seconds"]["total"]


def test_a_run_that_diverges_is_recorded_and_its_last_checkpoint_is_sound(train, results: Path) -> None:
    # Weight decay times this rate is 30: the weights alternate in sign and grow 29-fold with every step.
    absurd = {"training": {"learning_rate": 3000.0, "warmup_steps": 0}, "checkpoint": {"every_steps": 3}}
    shown = train(absurd)
    assert shown.code == 1
    found = record(results)
    validate(found)
    assert found["status"] == "failed"
    assert f"stopped at step {len(found['curves']['train_loss']) + 1}: " in found["reason"]
    assert re.search(r"first: (activation of|gradient of|parameter) .* on rank 0", found["reason"])
    assert shown.err.startswith("accel-train: error: ")
    assert shown.err.count("\n") == 1
    assert found["reason"].removeprefix("NonFinite: ") in shown.err
    assert checkpoints(results)
    for path in checkpoints(results):
        assert verify(path) == []
    before = tree(checkpoints(results)[-1])
    assert train(absurd).code == 1
    assert tree(checkpoints(results)[-1]) == before


def test_a_failure_of_another_rank_is_recorded(train, results: Path, monkeypatch) -> None:
    def fit(_trainer: Trainer) -> None:
        raise PeerFailed(1, "checkpoint files", "OSError: No space left on device")

    monkeypatch.setattr(Trainer, "fit", fit)
    shown = train()
    message = "rank 1 failed (waiting for 'checkpoint files'): OSError: No space left on device"
    assert (shown.code, shown.err) == (1, f"accel-train: error: {message}\n")
    assert (record(results)["status"], record(results)["reason"]) == ("failed", message)
    validate(record(results))


def test_a_record_that_cannot_be_written_does_not_hide_why_the_run_failed(train, results: Path, monkeypatch) -> None:
    def fit(_trainer: Trainer) -> None:
        monkeypatch.setattr("accel_train.runs.recorder.write_record", fail)
        fail()

    def fail(*_arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Trainer, "fit", fit)
    shown = train()
    assert shown.code == 1
    assert [line.partition(": [Errno")[0] for line in shown.err.splitlines()] == [
        "accel-train: error",
        "accel-train: error: the record could not be brought up to date",
    ]
    assert record(results)["status"] == "running"


# -- the same command again ----------------------------------------------------------------


def test_a_finished_run_is_not_touched_and_fresh_starts_over(train, results: Path, here) -> None:
    first = train(LENIENT, options=["--name", "one"])
    assert first.code == 0
    before = tree(run_dir(results))
    again = train(LENIENT, options=["--name", "one"])
    assert (again.code, again.err) == (0, "")
    assert again.lines("finished") == first.lines("completed")
    assert "gate passed after epoch 2" in again.lines("finished")[0]
    assert again.lines("training") == []
    assert tree(run_dir(results)) == before

    other = {"training": {"learning_rate": 0.001, "max_epochs": 1}}
    shown = train(LENIENT, other, options=["--name", "one"])
    assert (shown.code, shown.out) == (2, "")
    assert shown.err.count("\n") == 1
    for line in ("training.learning_rate: 0.001 here, 0.003 there", "training.max_epochs: 1 here, 2 there"):
        assert line in shown.err
    assert "choose another name, or --fresh" in shown.err
    assert tree(run_dir(results)) == before

    shown = train(LENIENT, other, options=["--name", "one", "--fresh"])
    assert shown.code == 0
    archived = [path for path in results.iterdir() if ".archived-" in path.name]
    assert str(archived[0]) in shown.lines("archive")[0]
    assert tree(archived[0]) == before
    assert record(results)["run_id"] != json.loads(before["result.json"])["run_id"]
    assert len(record(results)["curves"]["train_loss"]) == 20
    assert [row["id"] for row in json.loads(here("runs", results, "--json").out)] == ["one"]


# -- weights of another run ----------------------------------------------------------------


def test_a_new_run_starts_from_the_weights_of_another(train, results: Path, tmp_path: Path) -> None:
    no_dropout = {"model": {"dropout": 0.0}, "training": {"max_epochs": 1}}
    assert train(no_dropout).code == 0
    source = run_dir(results)
    trained = checkpoints(results)[-1]
    model, task = load_model(source), build_task(find_run(source).config)
    assert find_run(source).step == 20
    task.open(task.build(results / "corpora", SILENT))

    assert train(no_dropout, results=tmp_path / "new", options=["--start.weights", source]).code == 0
    found = record(tmp_path / "new")
    assert found["provenance"]["init_digest"] == read_manifest(trained)["files"]["model.safetensors"]["sha256"]
    assert found["experiment_id"] != source.name
    assert found["provenance"]["resumes"] == []

    dataset = WalkDataset(task.corpus.walks, 16)
    plan = Plan(TrainingConfig(batch_size=12), len(dataset), 1, 0, 42)
    ids = next(iter(plan.sampler()))
    inputs, targets = (torch.stack(parts) for parts in zip(*(dataset[int(i)] for i in ids), strict=True))
    with torch.no_grad():
        expected = float(next_token_cross_entropy(model.eval(), (inputs, targets)))
    assert found["curves"]["train_loss"][0] == pytest.approx(expected, abs=1e-5)
    assert expected < record(results)["curves"]["train_loss"][0] - 0.1


# -- all runs of a directory ---------------------------------------------------------------


def test_runs_are_listed_judged_and_replayed(train, results: Path, here) -> None:
    one_epoch = {"training": {"max_epochs": 1}, "walks": {"gate": {"stop_on_pass": True}}}
    assert train(one_epoch, options=["--name", "missed"]).code == 0
    second = train(one_epoch, LENIENT, options=["--name", "passed", "--training.max_epochs", 2])
    assert second.code == 0
    assert "found and verified" in second.lines("corpus")[0]
    assert len([path for path in (results / "corpora").iterdir() if path.is_dir()]) == 1

    for name in ("missed", "passed"):
        log = (results / name / "logs" / "rank_0.log").read_text()
        assert log.count("launch 1, rank 0, pid ") == 1, "a run logs into its own directory only"

    missed, passed = (json.loads((results / name / "result.json").read_text()) for name in ("missed", "passed"))
    assert (missed["status"], missed["gate"]["passed"]) == ("completed", False)
    assert missed["gate"]["failure_reason"]
    assert missed["metrics"]["scalars"]["final_edge_compliance"] is not None
    assert passed["gate"]["passed"]
    assert passed["metrics"]["scalars"]["epochs_trained"] == 1, "the gate ends training as soon as it is passed"
    assert [run["run_id"] for run in load_sufficient_runs(results)] == [passed["run_id"]]

    table = here("runs", results).out.splitlines()
    assert [line.split()[0] for line in table] == ["ID", "missed", "passed"]
    assert [line.split()[0] for line in here("runs", results, "--passed").out.splitlines()] == ["ID", "passed"]
    status = here("runs", results, "--status", "missed")
    assert (status.code, status.out) == (0, "completed\n")

    judged = here("evaluate", results / "missed")
    assert judged.code == 0
    verdict = json.loads(judged.out)
    assert verdict["step"] == 20
    for name in ("passed", "criteria", "evidence", "failure_reason"):
        assert verdict[name] == missed["gate"][name], name

    generated = here("generate", results / "missed", "--num", 3)
    assert generated.code == 0
    sequences = np.array([[int(word) for word in line.split()] for line in generated.out.splitlines()])
    assert sequences.shape == (3, 17)
    assert sequences.min() >= 0
    assert sequences.max() < 20
    prompts = np.load(next((results / "corpora").glob("walks-*/held_out.npy")))[:3, :4]
    assert (sequences[:, :4] == prompts).all()
    assert here("generate", results / "missed", "--num", 3).out == generated.out

    too_many = here("generate", results / "missed", "--num", 41)
    assert (too_many.code, too_many.out) == (2, "")
    assert "--num: 41 is more than the 40 held-out prompts" in too_many.err


def test_checkpoints_are_listed_and_verified(train, results: Path, here) -> None:
    assert train({"checkpoint": {"every_steps": 15, "keep_last": 9}, "training": {"max_epochs": 2}}).code == 0
    path = run_dir(results)
    listed = here("checkpoints", path)
    assert listed.code == 0
    head, *rows = [line.split() for line in listed.out.splitlines()]
    assert head == ["CHECKPOINT", "STEP", "EPOCH", "PROCESSES", "SIZE", "AGE", "STATE"]
    assert [row[:4] for row in rows] == [
        ["step_0000015", "15", "0", "1"],
        ["step_0000020", "20", "1", "1"],
        ["step_0000030", "30", "1", "1"],
        ["step_0000040", "40", "2", "1"],
    ]
    assert all(row[5] == "MB" and row[-2:] == ["sizes", "agree"] for row in rows)
    assert here("checkpoints", path, "--verify").out.count(" sound\n") == 4

    damaged = path / "checkpoints" / "step_0000030" / "optimizer.bin"
    damaged.write_bytes(bytes(damaged.stat().st_size))
    assert here("checkpoints", path).code == 0, "sizes tell nothing of a flipped byte"
    found = here("checkpoints", path, "--verify")
    assert found.code == 1
    assert "optimizer.bin does not match its SHA-256" in found.out.splitlines()[3]
    entries = json.loads(here("checkpoints", path, "--verify", "--json").out)
    assert [entry["problems"] for entry in entries] == [[], [], ["optimizer.bin does not match its SHA-256"], []]
    assert here("checkpoints", results / "missing").code == 2


def test_status_of_runs_that_did_not_finish(train, results: Path, here, monkeypatch) -> None:
    monkeypatch.setenv("STOP_AT_STEP", "2")
    assert train(POLITE, options=["--name", "stopped"]).code == 75
    status = here("runs", results, "--status", "stopped")
    assert (status.code, status.out) == (75, "preempted\n")
    broken = {"training": {"learning_rate": 1e30, "weight_decay": 1.0}}
    assert train(broken, options=["--name", "broken"]).code == 1
    status = here("runs", results, "--status", "broken")
    assert (status.code, status.out) == (1, "failed\n")
    assert load_sufficient_runs(results) == []


# -- names of files ------------------------------------------------------------------------


def test_paths_with_spaces_and_other_alphabets_in_a_plain_environment(tmp_path: Path) -> None:
    """A real process, whose locale is that of a bare container."""
    results = tmp_path / "run läufe 実験"
    one_step = {"training": {"max_steps": 2}, "name": "ein Lauf ß", "description": "ñandú"}
    config = write_config(tmp_path / "my config ö.yaml", TINY, QUICK, one_step, {"output_dir": str(results)})
    env = {k: v for k, v in environment(LC_ALL="C").items() if not k.startswith(("LANG", "PYTHONIOENC", "PYTHONUTF8"))}
    done = subprocess.run(command(config, 0), env=env, capture_output=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert os.fsencode(str(results / "ein Lauf ß" / "result.json")) in done.stdout
    assert record(results)["description"] == "ñandú"
    assert run_dir(results).name == "ein Lauf ß"
