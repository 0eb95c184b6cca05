"""What the pipeline leaves for people and programs: every epoch's figures, the verdict, and what to do about it.

All of it is derived from the record of the run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accel_train.checkpoints.manifest import step_directory

Values = Mapping[str, Any]
"""A record, or a part of it, as JSON values."""

_MEASURED = ("val_loss", "val_bits_per_byte", "probe_loss", "overfit_gap")


def training_metrics(record: Values, run_dir: Path) -> dict[str, Any]:
    """Every epoch's figures, all hyperparameters and where the models are, from the record of a completed run.

    ``training_metrics.schema.json`` beside this module is its JSON Schema (draft 2020-12).
    """
    scalars = record["metrics"]["scalars"]
    per_epoch = round(scalars["steps_trained"] / scalars["epochs_trained"])
    evaluations = _evaluations(record, per_epoch)
    measured = [each for each in evaluations if each["val_loss"] is not None]
    best = min(measured, key=lambda each: each["val_loss"], default=None)
    return {
        **{name: record[name] for name in ("experiment_id", "run_id", "config_hash")},
        "hyperparameters": record["config"],
        "epochs": _epochs(record["curves"]["train_loss"], per_epoch, evaluations),
        "evaluations": evaluations,
        "final": scalars,
        "best": best,
        "models": {
            "final": _checkpoint(run_dir, scalars["steps_trained"]),
            "best": None if best is None else _checkpoint(run_dir, best["step"]),
        },
        "timing": record["timing"],
        "provenance": record["provenance"],
    }


def _checkpoint(run_dir: Path, step: int) -> str:
    return str(run_dir / "checkpoints" / step_directory(step))


def _evaluations(record: Values, per_epoch: int) -> list[dict[str, Any]]:
    curves = record["curves"]
    seconds = {mark["step"]: mark["training_seconds"] for mark in record["timing"].get("evaluations", [])}
    return [
        {
            "step": step,
            "epoch": step / per_epoch,
            **{name: curves[name][place] for name in _MEASURED},
            "training_seconds": seconds.get(step),
        }
        for place, step in enumerate(curves["evaluation_step"])
    ]


def _epochs(losses: Sequence[float | None], per_epoch: int, evaluations: Sequence[Values]) -> list[dict[str, Any]]:
    """One row an epoch, the last one perhaps of fewer steps: mean training loss, and its last evaluation."""
    rows = []
    for number, first in enumerate(range(0, len(losses), per_epoch), 1):
        part = losses[first : first + per_epoch]
        known = [loss for loss in part if loss is not None]
        inside = [each for each in evaluations if number - 1 < each["epoch"] <= number]
        last = inside[-1] if inside else {}
        figures = {name: last.get(name) for name in (*_MEASURED, "training_seconds")}
        mean = math.fsum(known) / len(known) if known else None
        rows.append({"epoch": number, "steps": len(part), "train_loss": mean, **figures})
    return rows


def validation_report(gate: Values, scalars: Values, run_dir: Path, checkpoint: Values) -> dict[str, Any]:
    """The verdict on the finished model, with what it rests on."""
    verdict = {name: gate[name] for name in ("passed", "criteria", "failure_reason", "evidence")}
    return {"run": str(run_dir), "checkpoint": checkpoint, "metrics": dict(scalars), **verdict}


def advice(known: Mapping[str, str], gate: Values) -> str:
    """Return what to do about the criteria that were missed.

    Args:
        known: advice of the task, by metric.
        gate: the verdict.
    """
    missed = [known[row["metric"]] for row in gate["criteria"] if not row["passed"] and row["metric"] in known]
    return "; ".join([*dict.fromkeys(missed), "or change the gate in the configuration (--config)"])


def verdict_lines(gate: Values, scalars: Values) -> list[tuple[str, str]]:
    """``(heading, line)`` for people: the losses in both units, then every criterion."""
    losses = f"{scalars['final_val_loss']:.4f} nats per token, {scalars['val_bits_per_byte']:.4f} bits per byte"
    lines = [("measured", f"{losses} on the held-out text (best {scalars['best_val_loss']:.4f})")]
    for row in gate["criteria"]:
        value = "not measured" if row["value"] is None else f"{row['value']:.4g}"
        mark = "passed" if row["passed"] else "MISSED"
        lines.append((mark, f"{row['metric']:<16} {value:>12}   asked {row['op']} {row['threshold']:g}"))
    return lines
