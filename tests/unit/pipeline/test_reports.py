"""What the pipeline's reports say, from records made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from accel_train.pipeline import reports
from accel_train.pipeline.reports import advice, training_metrics, validation_report, verdict_lines
from accel_train.tasks.text.config import GateConfig
from accel_train.tasks.text.task import TextTask

SCHEMA = json.loads(Path(reports.__file__).with_name("training_metrics.schema.json").read_text(encoding="utf-8"))


def record(steps: int, per_epoch: int, evaluated: list[int]) -> dict[str, Any]:
    losses = [10.0 - step for step in range(1, steps + 1)]
    return {
        "experiment_id": "e",
        "run_id": "r",
        "config_hash": "0" * 64,
        "config": dict.fromkeys(["task", "seed", "text", "model", "training"]),
        "curves": {
            "train_loss": losses,
            "evaluation_step": evaluated,
            "val_loss": [20.0 - step for step in evaluated],
            "val_bits_per_byte": [2.0 - step / 10 for step in evaluated],
            "probe_loss": [1.0 for _ in evaluated],
            "overfit_gap": [19.0 - step for step in evaluated],
        },
        "metrics": {
            "scalars": {"steps_trained": steps, "epochs_trained": steps / per_epoch, "final_val_loss": 20.0 - steps}
        },
        "timing": {"seconds": {}, "evaluations": [{"step": s, "training_seconds": s / 2} for s in evaluated]},
        "provenance": {"launches": 1, "world_sizes": [1]},
    }


@pytest.mark.parametrize(
    ("steps", "per_epoch", "evaluated", "rows"),
    [
        (6, 3, [3, 6], [(1, 3, 8.0, 17.0, 1.5), (2, 3, 5.0, 14.0, 3.0)]),
        # Every two steps, and a last epoch that was cut short.
        (4, 3, [2, 4], [(1, 3, 8.0, 18.0, 1.0), (2, 1, 6.0, 16.0, 2.0)]),
        (2, 3, [2], [(1, 2, 8.5, 18.0, 1.0)]),
        (6, 3, [6], [(1, 3, 8.0, None, None), (2, 3, 5.0, 14.0, 3.0)]),
    ],
)
def test_every_epoch_has_its_losses_and_its_last_evaluation(
    steps: int, per_epoch: int, evaluated: list[int], rows: list[tuple[Any, ...]]
) -> None:
    found = training_metrics(record(steps, per_epoch, evaluated), Path("run"))
    jsonschema.validate(found, SCHEMA)
    names = ("epoch", "steps", "train_loss", "val_loss", "training_seconds")
    assert [tuple(row[name] for name in names) for row in found["epochs"]] == rows
    assert [each["epoch"] for each in found["evaluations"]] == [step / per_epoch for step in evaluated]
    assert found["models"] == {
        "final": f"run/checkpoints/step_{steps:07d}", "best": f"run/checkpoints/step_{evaluated[-1]:07d}"
    }  # fmt: skip


def test_every_criterion_that_can_be_missed_has_its_own_advice() -> None:
    thresholds = {name.removesuffix("_threshold") for name in vars(GateConfig()) if name.endswith("_threshold")}
    assert set(TextTask.advice) == thresholds


def test_advice_is_for_what_was_missed() -> None:
    rows = [
        {"metric": "val_loss", "passed": True},
        {"metric": "overfit_gap", "passed": False},
        {"metric": "rss_mb", "passed": False},
    ]
    assert advice(TextTask.advice, {"criteria": rows}) == (
        f"{TextTask.advice['overfit_gap']}; {TextTask.advice['rss_mb']}; "
        "or change the gate in the configuration (--config)"
    )


def test_a_missed_criterion_without_advice_leaves_the_gate() -> None:
    rows = [{"metric": "something_new", "passed": False}]
    assert advice(TextTask.advice, {"criteria": rows}) == "or change the gate in the configuration (--config)"


def test_the_report_holds_the_verdict_and_what_it_rests_on() -> None:
    gate = {"passed": False, "criteria": [], "failure_reason": "thin", "evidence": {"n": 3}, "epoch": None}
    checkpoint = {"path": "run/checkpoints/step_0000004", "weights_sha256": "0" * 64}
    assert validation_report(gate, {"final_val_loss": 2.0}, Path("run"), checkpoint) == {
        "run": "run",
        "checkpoint": checkpoint,
        "metrics": {"final_val_loss": 2.0},
        "passed": False,
        "criteria": [],
        "failure_reason": "thin",
        "evidence": {"n": 3},
    }


def test_the_verdict_is_a_line_for_every_criterion() -> None:
    rows = [
        {"metric": "val_loss", "op": "<", "threshold": 5.0, "value": 2.5, "passed": True},
        {"metric": "rss_mb", "op": "<=", "threshold": 400.0, "value": None, "passed": False},
    ]
    scalars = {"final_val_loss": 2.5, "val_bits_per_byte": 1.25, "best_val_loss": 2.25}
    lines = verdict_lines({"criteria": rows}, scalars)
    assert [heading for heading, _ in lines] == ["measured", "passed", "MISSED"]
    told = [" ".join(line.split()) for _, line in lines]
    assert told == [
        "2.5000 nats per token, 1.2500 bits per byte on the held-out text (best 2.2500)",
        "val_loss 2.5 asked < 5",
        "rss_mb not measured asked <= 400",
    ]
