"""The record of a run: ``result.json`` (what it was, what came of it) and ``metrics.jsonl`` (how it went).

Nothing else reads or writes these two files. The record is a plain dictionary in the form that
``result.schema.json`` prescribes, so any tool can read it; the price is that its fields are
checked by the schema in the tests and not by types. A number that is not finite is stored as
null, since JSON has no other word for it; what went wrong then stands in ``gate.failure_reason``
or ``reason``.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import math
import os
import platform
import re
import secrets
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import resources
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from accel_train.config.sections import ExperimentConfig, to_dict
from accel_train.errors import RecordError
from accel_train.files.atomic import naming, write_atomic
from accel_train.process.fault_points import RECORD_WRITTEN_ASIDE, SILENT, Observer
from accel_train.runs.lock import live_runs

SCHEMA_VERSION = 1
RECORD_FILE = "result.json"
METRICS_FILE = "metrics.jsonl"
SAMPLES_DIRECTORY = "samples"
_SAMPLES_OF_STEP = re.compile(r"step_(\d+)(\D.*)?")
STATUSES = ("running", "preempted", "completed", "failed")
STATUS_CODES = {"completed": 0, "failed": 1, "live": 3, "preempted": 75, "interrupted": 75}
"""Exit codes of ``accel-train runs --status``. ``interrupted``: the record says running, but no process does."""

_CARRIED_ON = ("run_id", "created_at", "curves", "metrics", "gate", "timing")
_PACKAGES = ("torch", "accelerate", "numpy", "scipy", "safetensors", "tokenizers", "accel_train")

log = logging.getLogger(__name__)


# -- result.json ---------------------------------------------------------------------------


def new_record(
    config: ExperimentConfig,
    *,
    experiment_id: str,
    config_hash: str,
    init_digest: str | None = None,
    command: Sequence[str] = (),
    earlier: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """A record with every field of the schema, for a launch that is about to start.

    Args:
        config: stored whole, as given.
        experiment_id: name derived from the configuration.
        config_hash: SHA-256 (hex) of the fields that change the result.
        init_digest: digest of the weights that ``training.init_from`` names.
        command: the command line of this launch.
        earlier: the record that an earlier launch of this run left; its run id, results and
            timing are carried on.
    """
    commit, dirty = git_state()
    provenance = {
        "git_commit": commit,
        "git_dirty": dirty,
        "hook_list": [],
        "versions": versions(),
        "command": list(command),
        "init_digest": init_digest,
        "launches": 1,
        "world_sizes": [],
        "resumes": [],
        "data_fingerprint": None,
        "machine": {},
    }
    record = {
        "schema_version": SCHEMA_VERSION,
        "experiment_id": experiment_id,
        "run_id": new_run_id(),
        "status": "running",
        "reason": None,
        "description": config.description,
        "tags": list(config.tags),
        "created_at": timestamp(),
        "finished_at": None,
        "config": to_dict(config),
        "config_hash": config_hash,
        "curves": {"train_loss": [], "edge_compliance": [], "rule_compliance": []},
        "metrics": {
            "scalars": {
                "final_train_loss": None,
                "final_edge_compliance": None,
                "final_rule_compliance": None,
                "gate_passed": False,
                "epochs_trained": 0,
            }
        },
        "gate": {
            "passed": None,
            "epoch": None,
            "criteria": [],
            "evidence": {},
            "preflight": None,
            "failure_reason": None,
            "first_passed_epoch": None,
        },
        "provenance": provenance,
        "timing": {"seconds": {}, "tokens_per_second": None},
    }
    if earlier is not None:
        record |= {name: earlier[name] for name in _CARRIED_ON}
        for name in ("world_sizes", "resumes", "data_fingerprint"):
            provenance[name] = earlier["provenance"][name]
        provenance["launches"] = earlier["provenance"]["launches"] + 1
    return record


def write_record(run_dir: Path, record: Mapping[str, Any], observer: Observer = SILENT) -> None:
    """Replace ``run_dir / result.json`` atomically.

    Args:
        run_dir: the run directory.
        record: every field.
        observer: hears when the new record is complete and has not taken its place.

    Raises:
        TypeError: a value is not JSON (numbers of numpy count as numbers); names its place.
        OSError: the disk is full; the old record is intact.
    """
    # One section per line: readable, and the fast encoder is kept (indenting switches it off).
    sections = [f"{json.dumps(name)}: {strict_json(value, name)}" for name, value in record.items()]
    content = ("{\n" + ",\n".join(sections) + "\n}\n").encode()
    write_atomic(run_dir / RECORD_FILE, content, written_aside=lambda: observer.reached(RECORD_WRITTEN_ASIDE))


def read_record(run_dir: Path) -> dict[str, Any]:
    """The record of a run.

    Raises:
        RecordError: it is missing, damaged, or of a newer version.
    """
    path = run_dir / RECORD_FILE
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RecordError(path, "does not exist; is this the directory of a run?") from error
    except OSError as error:
        raise RecordError(path, f"cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise RecordError(path, f"is damaged ({error}); restore it, or start over with --fresh") from error
    if not isinstance(record, dict) or record.get("status") not in STATUSES:
        raise RecordError(path, "is not a record of a run; restore it, or start over with --fresh")
    version = record.get("schema_version")
    if version != SCHEMA_VERSION:
        raise RecordError(path, f"has schema version {version!r}, this program reads {SCHEMA_VERSION}; update it")
    return record


def load_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of ``result.json``."""
    text = resources.files("accel_train").joinpath("result.schema.json").read_text(encoding="utf-8")
    schema: dict[str, Any] = json.loads(text)
    return schema


def strict_json(value: Any, place: str = "value") -> str:
    """One line of JSON; numbers that are not finite become null.

    Raises:
        TypeError: a value is not JSON; names its ``place``.
    """
    try:
        return json.dumps(value, allow_nan=False, ensure_ascii=False)
    except (ValueError, TypeError):
        return json.dumps(_plain(value, place), allow_nan=False, ensure_ascii=False)


def _plain(value: Any, place: str) -> Any:
    """``value`` as JSON values: non-finite numbers become null, numpy's numbers ordinary ones."""
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{place}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{place}[{index}]") for index, item in enumerate(value)]
    raise TypeError(f"{place}: {type(value).__name__} cannot be stored as JSON")


# -- metrics.jsonl -------------------------------------------------------------------------


class MetricsLog:
    """The log of a run: one JSON object per line, each with its ``step``.

    A line reaches the operating system before :meth:`append` returns, so it outlives the process.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, line: Mapping[str, Any]) -> None:
        """Add one line.

        Raises:
            KeyError: it has no ``step``, so :meth:`cut_back` could not place it.
            OSError: the disk is full; names the file.
        """
        _ = line["step"]
        with naming(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(strict_json(line, "line") + "\n")

    def cut_back(self, step: int, *, evaluation_due: bool = False) -> int:
        """Remove every line after ``step``, and what a killed process left half-written; atomic.

        Returns the last step that the log told of, 0 without any.

        Args:
            step: the last step whose lines stay.
            evaluation_due: the evaluation of that step will be done again, so its line goes as well.
        """
        content = self.path.read_bytes() if self.path.exists() else b""
        lines = list(_parsed(content))
        kept = b"".join(
            raw
            for raw, line in lines
            if line["step"] < step or (line["step"] == step and not (evaluation_due and "gate_passed" in line))
        )
        if kept != content:
            write_atomic(self.path, kept)
        return max((line["step"] for _, line in lines), default=0)

    def read(self) -> list[dict[str, Any]]:
        """All whole lines; empty when there is no log."""
        return [line for _, line in _parsed(self.path.read_bytes())] if self.path.exists() else []


def cut_back_samples(directory: Path, step: int) -> None:
    """Remove samples of steps after ``step``: files or folders whose names begin with ``step_N``."""
    for path in directory.iterdir() if directory.is_dir() else ():
        found = _SAMPLES_OF_STEP.fullmatch(path.name)
        if found and int(found[1]) > step:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _parsed(content: bytes) -> Iterable[tuple[bytes, dict[str, Any]]]:
    """Each whole line, raw and parsed. A torn one has no newline (it may parse) or no meaning."""
    for raw in content.splitlines(keepends=True):
        try:
            line = json.loads(raw)
        except ValueError:
            continue
        if raw.endswith(b"\n") and isinstance(line, dict) and isinstance(line.get("step"), int):
            yield raw, line


# -- all runs of a results directory -------------------------------------------------------


@dataclass(frozen=True)
class RunSummary:
    """One row of ``accel-train runs``."""

    id: str
    """Name of the run directory."""
    status: str
    """A key of STATUS_CODES, or ``damaged`` when the record cannot be read."""
    epochs: float
    gate_passed: bool
    edge_compliance: float | None
    rule_compliance: float | None
    val_loss: float | None
    """Nats per token; runs of the text task."""
    val_bits_per_byte: float | None
    """The same, whatever the vocabulary."""
    created_at: str | None
    """ISO 8601, UTC."""


def list_runs(results: str | Path) -> list[RunSummary]:
    """All runs under ``results``, oldest first; archived ones and shared corpora are left out.

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
            record = _read_if_any(directory)
        except RecordError as error:
            log.warning("%s", error)
            runs.append(RunSummary(directory.name, "damaged", 0, False, None, None, None, None, None))
            continue
        scalars = record.get("metrics", {}).get("scalars", {})
        runs.append(
            RunSummary(
                id=directory.name,
                status=_status(record, directory in live),
                epochs=scalars.get("epochs_trained") or 0,
                gate_passed=bool(record.get("gate", {}).get("passed")),
                edge_compliance=scalars.get("final_edge_compliance"),
                rule_compliance=scalars.get("final_rule_compliance"),
                val_loss=scalars.get("final_val_loss"),
                val_bits_per_byte=scalars.get("val_bits_per_byte"),
                created_at=record.get("created_at"),
            )
        )
    return sorted(runs, key=lambda run: (run.created_at or "", run.id))


def load_sufficient_runs(results: str | Path) -> list[dict[str, Any]]:
    """The records of the runs under ``results`` that are completed and passed their gate, oldest first.

    A record that cannot be read is left out with a warning in the log.

    Raises:
        RecordError: ``results`` is not a directory.
    """
    passed = [run.id for run in list_runs(results) if run.status == "completed" and run.gate_passed]
    return [read_record(Path(results) / name) for name in passed]


def run_status(run_dir: Path) -> str:
    """How a run stands: a key of STATUS_CODES.

    Raises:
        RecordError: there is no such run, or its record is damaged.
    """
    if not _is_run(run_dir):
        raise RecordError(run_dir, "is not the directory of a run")
    return _status(_read_if_any(run_dir), bool(live_runs([run_dir])))


def _is_run(path: Path) -> bool:
    has_files = (path / RECORD_FILE).is_file() or (path / "config.yaml").is_file()
    return has_files and ".archived-" not in path.name


def _read_if_any(run_dir: Path) -> dict[str, Any]:
    """The record, or an empty one for a run that was killed before it wrote its first."""
    return read_record(run_dir) if (run_dir / RECORD_FILE).exists() else {"status": "running"}


def _status(record: Mapping[str, Any], live: bool) -> str:
    status: str = record["status"]
    if status == "completed":
        return status
    if live:
        return "live"
    return "interrupted" if status == "running" else status


# -- provenance ----------------------------------------------------------------------------


def new_run_id() -> str:
    """A fresh run id that sorts by time, such as ``20260314T150926-5a3f9c1e``."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(4)}"


def timestamp() -> str:
    """The time now as ISO 8601 in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that may change results; imports none of them."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_state(root: Path | None = None) -> tuple[str | None, bool | None]:
    """Commit of the source checkout, and whether it has changes that are not committed.

    ``(None, None)`` without git, and where the package lies in no repository of its own (an
    installed package inside somebody else's checkout is not that checkout's code).

    Args:
        root: top of the checkout; by default the directory that holds the package.
    """
    root = (root or Path(__file__).parents[2]).resolve()
    found = _git(root, "rev-parse", "--show-toplevel", "HEAD")
    lines = [] if found is None else found.splitlines()
    if len(lines) != 2 or Path(lines[0]).resolve() != root:
        return None, None
    changes = _git(root, "status", "--porcelain")
    return lines[1], None if changes is None else bool(changes)


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
