"""All runs of a results directory, and how each stands. Only files are read, so nobody who trains is disturbed."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accel_train.errors import EXIT_FAILED, EXIT_LIVE, EXIT_OK, EXIT_PREEMPTED, RecordError
from accel_train.runs.directory import CONFIG_FILE
from accel_train.runs.lock import live_runs
from accel_train.runs.record import RECORD_FILE, read_record, read_values

STATUS_CODES = {
    "completed": EXIT_OK,
    "failed": EXIT_FAILED,
    "live": EXIT_LIVE,
    "preempted": EXIT_PREEMPTED,
    "interrupted": EXIT_PREEMPTED,
}
"""Exit codes of ``accel-train runs --status``. ``interrupted``: the record says running, but no process does."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunSummary:
    """One row of ``accel-train runs``."""

    id: str
    """Name of the run directory."""
    status: str
    """A key of STATUS_CODES, or ``damaged`` when the record cannot be read."""
    epochs: float = 0
    gate_passed: bool = False
    columns: dict[str, str] = field(default_factory=dict)
    """Heading and scalar of every column of the task."""
    figures: dict[str, float | None] = field(default_factory=dict)
    """The scalars of the columns, without ``final_``."""
    created_at: str | None = None
    """ISO 8601, UTC."""

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values, the figures beside the other fields."""
        first = {name: getattr(self, name) for name in ("id", "status", "epochs", "gate_passed")}
        return {**first, **self.figures, "created_at": self.created_at}


def list_runs(results: str | Path) -> list[RunSummary]:
    """Return all runs under ``results``, oldest first; archived ones and shared corpora are left out.

    Raises:
        RecordError: ``results`` is not a directory.
    """
    results = Path(results)
    if not results.is_dir():
        raise RecordError(results, "is not a directory")
    directories = [path for path in sorted(results.iterdir()) if _is_run(path)]
    live = live_runs(directories)
    runs = []
    for directory in directories:
        try:
            runs.append(_summary(directory, directory in live))
        except RecordError as error:
            log.warning("%s", error)
            runs.append(RunSummary(directory.name, "damaged"))
    return sorted(runs, key=lambda run: (run.created_at or "", run.id))


def _summary(directory: Path, live: bool) -> RunSummary:
    record = _read_if_any(directory)
    scalars = record.get("metrics", {}).get("scalars", {})
    columns = record.get("columns", {})
    return RunSummary(
        id=directory.name,
        status=_status(record, live),
        epochs=scalars.get("epochs_trained") or 0,
        gate_passed=bool(record.get("gate", {}).get("passed")),
        columns=columns,
        figures={name.removeprefix("final_"): scalars.get(name) for name in columns.values()},
        created_at=record.get("created_at"),
    )


def load_sufficient_runs(results: str | Path) -> list[dict[str, Any]]:
    """Return the records of the runs under ``results`` that are completed and passed their gate, oldest first.

    A record that cannot be read is left out with a warning in the log.

    Raises:
        RecordError: ``results`` is not a directory.
    """
    records = []
    for run in list_runs(results):
        if run.status == "completed" and run.gate_passed:
            try:
                records.append(read_record(Path(results) / run.id).to_dict())
            except RecordError as error:
                log.warning("%s", error)
    return records


def run_status(run_dir: Path) -> str:
    """Return how a run stands: a key of STATUS_CODES.

    Raises:
        RecordError: there is no such run, or its record is damaged.
    """
    if not _is_run(run_dir):
        raise RecordError(run_dir, "is not the directory of a run")
    return _status(_read_if_any(run_dir), bool(live_runs([run_dir])))


def _is_run(path: Path) -> bool:
    has_files = (path / RECORD_FILE).is_file() or (path / CONFIG_FILE).is_file()
    return has_files and ".archived-" not in path.name


def _read_if_any(run_dir: Path) -> dict[str, Any]:
    """The record, or an empty one for a run that was killed before it wrote its first."""
    return read_values(run_dir) if (run_dir / RECORD_FILE).exists() else {"status": "running"}


def _status(record: Mapping[str, Any], live: bool) -> str:
    status: str = record["status"]
    if live and status != "completed":
        return "live"
    return "interrupted" if status == "running" else status
