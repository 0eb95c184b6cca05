"""``accel-train runs`` and ``accel-train checkpoints``: tables for people, JSON for programs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from accel_train.checkpoints.manifest import survey
from accel_train.config.sections import ExperimentConfig
from accel_train.errors import EXIT_FAILED, EXIT_OK, ConfigError
from accel_train.runs.listing import STATUS_CODES, RunSummary, list_runs, run_status


def runs(arguments: argparse.Namespace) -> int:
    """Print a table of the runs, or the status of one, which is the exit code as well."""
    results = arguments.results or Path(ExperimentConfig.output_dir)
    if arguments.status is not None:
        status = run_status(results / arguments.status)
        print(json.dumps({"id": arguments.status, "status": status}) if arguments.json else status)
        return STATUS_CODES[status]
    found = list_runs(results)
    if arguments.passed:
        found = [run for run in found if run.status == "completed" and run.gate_passed]
    if arguments.json:
        print(json.dumps([run.to_dict() for run in found], indent=1))
    else:
        print("\n".join(_table(found)))
    return EXIT_OK


def checkpoints(arguments: argparse.Namespace) -> int:
    """Print the checkpoints of a run; exit code 0 when every committed one is sound as far as was looked, else 1."""
    if not arguments.run.is_dir():
        raise ConfigError("RUN", str(arguments.run), "is not a directory; name the directory of a run")
    found = survey(arguments.run / "checkpoints", full=arguments.verify)
    if arguments.json:
        print(json.dumps([asdict(checkpoint) for checkpoint in found], indent=1))
    elif not found:
        print(f"{arguments.run} has no checkpoint yet")
    else:
        sound = "sound" if arguments.verify else "sizes agree"
        rows: list[tuple[str, ...]] = [("CHECKPOINT", "STEP", "EPOCH", "PROCESSES", "SIZE", "AGE", "STATE")]
        for each in found:
            state = "set aside as damaged" if each.set_aside else "; ".join(each.problems) or sound
            cells = ["-" if value is None else f"{value}" for value in (each.step, each.epoch, each.world_size)]
            rows.append((each.name, *cells, f"{each.size / 1e6:.1f} MB", _age(each.written_at), state))
        print("\n".join(_aligned(rows)))
    return EXIT_FAILED if any(each.problems and not each.set_aside for each in found) else EXIT_OK


def _table(found: Sequence[RunSummary]) -> list[str]:
    """Rows of the table: the columns of every task that has a run here stand in all of them."""
    columns = {heading: name.removeprefix("final_") for run in found for heading, name in run.columns.items()}
    rows: list[tuple[str, ...]] = [("ID", "STATUS", "EPOCHS", "GATE", *columns, "AGE")]
    for run in found:
        values = [run.figures.get(name) for name in columns.values()]
        figures = ["-" if value is None else f"{value:.3f}" for value in values]
        gate = "passed" if run.gate_passed else "-"
        rows.append((run.id, run.status, f"{run.epochs:.4g}", gate, *figures, _age(run.created_at)))
    return _aligned(rows)


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Cells padded to the width of their column."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _age(created_at: str | None) -> str:
    """Such as ``5m``, ``3h``, ``12d``."""
    if created_at is None:
        return "-"
    seconds = max(0.0, (datetime.now(UTC) - datetime.fromisoformat(created_at)).total_seconds())
    for unit, length in (("d", 86_400), ("h", 3_600), ("m", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f}{unit}"
    return f"{seconds:.0f}s"
