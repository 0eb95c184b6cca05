"""The record of a run, ``result.json``: what it was and what came of it.

:class:`RunRecord` is its one definition: what is written, what is read and the JSON Schema come from it. A
number that is not finite is stored as null, since JSON has no other word for it; what went wrong then stands
in ``gate.failure_reason`` or ``reason``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.config import JsonDict

from accel_train.config.fields import to_dict
from accel_train.config.identity import config_hash, experiment_id
from accel_train.config.sections import ExperimentConfig
from accel_train.errors import RecordError
from accel_train.files.atomic import write_atomic
from accel_train.process.fault_points import RECORD_WRITTEN_ASIDE
from accel_train.process.work import pass_by
from accel_train.runs.provenance import git_state, new_run_id, timestamp, versions
from accel_train.tasks.base import Task

SCHEMA_VERSION: Literal[1] = 1
RECORD_FILE = "result.json"
Status = Literal["running", "preempted", "completed", "failed"]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Time = Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d")]
Scalar = bool | int | float | None
Curve = list[int | float | None]
"""A step stays a whole number when a record is read back."""


class _Part(BaseModel):
    model_config = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, json_schema_serialization_defaults_required=True
    )


class CriterionResult(_Part):
    """One criterion of the gate, and what became of it."""

    metric: str
    """Name of the figure."""
    op: Literal[">", ">=", "<", "<="]
    """How it is compared."""
    threshold: float
    """What it is compared with."""
    value: float | None
    """What was measured; null: it could not be."""
    passed: bool
    """Whether the criterion holds."""


def _implies(name: str, value: str | bool, properties: JsonDict) -> JsonDict:
    """Schema of a part whose field ``name`` has ``value`` only where its ``properties`` hold."""
    return {"if": {"properties": {name: {"const": value}}}, "then": {"properties": properties}}


_OF_A_PASS: JsonDict = {
    "failure_reason": {"type": "null"},
    "epoch": {"type": "integer"},
    "criteria": {"minItems": 1, "items": {"properties": {"passed": {"const": True}}}},
}


class GateResult(_Part):
    """The verdict, with what it rests on."""

    model_config = ConfigDict(json_schema_extra=_implies("passed", True, _OF_A_PASS))

    passed: bool | None = None
    """Null: not judged yet."""
    epoch: Annotated[int, Field(ge=0)] | None = None
    """Epoch of the verdict."""
    criteria: list[CriterionResult] = []
    """Every criterion that was asked."""
    evidence: dict[str, Any] = {}
    """What the values rest on; empty before the first evaluation."""
    preflight: dict[str, Any] | None = None
    """What the gate could reach, before the first step."""
    failure_reason: str | None = None
    """One clause per failed criterion; null: it passed."""
    first_passed_epoch: Annotated[int, Field(ge=0)] | None = None
    """The first epoch that passed; a run that does not stop there is judged by its last."""


class Metrics(_Part):
    """Single figures of the run."""

    scalars: dict[str, Scalar]
    """By name; null: not measured."""


class Provenance(_Part):
    """Where the run comes from, and what decides its bits."""

    git_commit: Annotated[str, Field(pattern="^[0-9a-f]{40,64}$")] | None
    """Of the source checkout; null: there is none."""
    git_dirty: bool | None
    """Whether the checkout had changes that were not committed."""
    hook_list: list[str] = []
    """Hooks in force."""
    versions: dict[str, str]
    """Of Python and of the libraries that may change results."""
    command: list[str]
    """The command line of the last launch."""
    init_digest: Sha256 | None
    """Of the weights that ``start.weights`` names."""
    launches: Annotated[int, Field(ge=1)] = 1
    """Launches so far, this one included."""
    world_sizes: list[Annotated[int, Field(ge=1)]] = []
    """Number of processes of each launch."""
    resumes: list[dict[str, Any]] = []
    """One entry per resume, the oldest first."""
    data_fingerprint: str | None = None
    """Of the samples that were consumed."""
    machine: dict[str, Any] = {}
    """Device, threads, precision, compilation, sharding, processes."""


class Timing(_Part):
    """Seconds over all launches."""

    seconds: dict[str, Annotated[float, Field(ge=0)]] = {}
    """By phase."""
    tokens_per_second: float | None = None
    """Of the last launch."""
    evaluations: list[dict[str, int | float]] = []
    """Seconds of training up to each evaluation."""


class RunRecord(_Part):
    """The record of one run, written at every epoch and on every exit."""

    model_config = ConfigDict(json_schema_extra=_implies("status", "failed", {"reason": {"type": "string"}}))

    schema_version: Literal[1] = SCHEMA_VERSION
    experiment_id: Annotated[str, Field(min_length=1)]
    """Readable name, made from the configuration."""
    run_id: Annotated[str, Field(min_length=1)]
    """Stays the same when the run is resumed."""
    status: Status = "running"
    reason: str | None = None
    """What ended a failed or preempted launch."""
    description: str
    """Free text of the configuration."""
    tags: list[str]
    """Labels of the configuration."""
    created_at: Time
    """Of the first launch, UTC."""
    finished_at: Time | None = None
    """Null: it goes on, or will."""
    config: dict[str, Any]
    """As given, every section."""
    config_hash: Sha256
    """Of every field that changes the result."""
    columns: dict[str, str] = {}
    """Columns of ``accel-train runs``: heading and scalar."""
    curves: dict[str, Curve]
    """``train_loss`` per step, the task's own per evaluation."""
    metrics: Metrics
    """Single figures."""
    gate: GateResult = Field(default_factory=GateResult)
    """The verdict."""
    provenance: Provenance
    """Where it comes from."""
    timing: Timing = Field(default_factory=Timing)
    """How long it took."""

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON values."""
        # Whoever computed a figure may have left it a number of NumPy; it is written as one of JSON.
        return self.model_dump(warnings=False)


def record_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of ``result.json``."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": "urn:accel_train:result:1"}
    return {**schema, **RunRecord.model_json_schema(mode="serialization")}


def new_record(
    config: ExperimentConfig,
    task: Task | type[Task],
    *,
    init_digest: str | None = None,
    command: Sequence[str] = (),
    earlier: RunRecord | None = None,
) -> RunRecord:
    """Return the record of a launch that is about to start.

    Args:
        config: stored whole, as given.
        task: names the curves and columns.
        init_digest: digest of the weights that ``start.weights`` names.
        command: the command line of this launch.
        earlier: the record that an earlier launch of this run left; its run id, results and
            timing are carried on.
    """
    commit, dirty = git_state()
    columns = dict(task.columns)
    scalars = {"final_train_loss": None, **dict.fromkeys(columns.values()), "gate_passed": False, "epochs_trained": 0}
    record = RunRecord(
        experiment_id=experiment_id(config, init_digest),
        run_id=new_run_id(),
        description=config.description,
        tags=list(config.tags),
        created_at=timestamp(),
        config=to_dict(config),
        config_hash=config_hash(config, init_digest),
        columns=columns,
        curves={"train_loss": [], **{name: [] for name in task.curves}},
        metrics=Metrics(scalars=scalars),
        provenance=Provenance(
            git_commit=commit, git_dirty=dirty, versions=versions(), command=list(command), init_digest=init_digest
        ),
    )
    if earlier is not None:
        for name in ("run_id", "created_at", "curves", "metrics", "gate", "timing"):
            setattr(record, name, getattr(earlier, name))
        for name in ("world_sizes", "resumes", "data_fingerprint"):
            setattr(record.provenance, name, getattr(earlier.provenance, name))
        record.provenance.launches = earlier.provenance.launches + 1
    return record


def write_record(run_dir: Path, record: RunRecord, reached: Callable[[str], None] = pass_by) -> None:
    """Replace ``run_dir / result.json`` atomically.

    Args:
        run_dir: the run directory.
        record: what to write.
        reached: hears when the new record is complete and has not taken its place.

    Raises:
        TypeError: a value is not JSON (numbers of numpy count as numbers); names its place.
        OSError: the disk is full; the old record is intact.
    """
    # One section per line: readable, and the fast encoder is kept (indenting switches it off).
    sections = [f"{json.dumps(name)}: {strict_json(value, name)}" for name, value in record.to_dict().items()]
    content = ("{\n" + ",\n".join(sections) + "\n}\n").encode()
    write_atomic(run_dir / RECORD_FILE, content, written_aside=lambda: reached(RECORD_WRITTEN_ASIDE))


def read_record(run_dir: Path) -> RunRecord:
    """Return the record of a run.

    Raises:
        RecordError: it is missing, damaged, or of a newer version.
    """
    try:
        return RunRecord.model_validate(read_values(run_dir))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        rule = f"is damaged ({where}: {first['msg']}); restore it, or start over with --fresh"
        raise RecordError(run_dir / RECORD_FILE, rule) from error


def read_values(run_dir: Path) -> dict[str, Any]:
    """Return the record of a run as plain values, of which only status and version are looked at.

    Raises:
        RecordError: it is missing, no JSON, no record, or of a newer version.
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
    if not isinstance(record, dict) or record.get("status") not in Status.__args__:  # type: ignore[attr-defined]
        raise RecordError(path, "is not a record of a run; restore it, or start over with --fresh")
    version = record.get("schema_version")
    if version != SCHEMA_VERSION:
        raise RecordError(path, f"has schema version {version!r}, this program reads {SCHEMA_VERSION}; update it")
    return record


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
