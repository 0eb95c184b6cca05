"""Keeps the record of a run up to date while it trains: what ``result.json`` says at any moment.

The record is derived from the training state and the last evaluation; nothing is kept here that
a killed run would miss, except the seconds, which are those of all launches that left by
themselves.
"""

from __future__ import annotations

import importlib
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accel_train.files.atomic import write_atomic
from accel_train.process.fault_points import SILENT, Observer
from accel_train.process.stopwatch import Stopwatch
from accel_train.runs.record import (
    METRICS_FILE,
    SAMPLES_DIRECTORY,
    MetricsLog,
    cut_back_samples,
    new_record,
    timestamp,
    write_record,
)
from accel_train.training.callbacks import Callback, LoopState
from accel_train.training.progress import say

if TYPE_CHECKING:
    from accel_train.runs.directory import RunDirectory
    from accel_train.training.trainer import Trainer

log = logging.getLogger(__name__)

_WALK_CURVES = ("edge_compliance", "rule_compliance")
_TEXT_CURVES = ("val_loss", "val_bits_per_byte", "probe_loss", "overfit_gap")
_OWN_NAME = frozenset(
    {"val_bits_per_byte", "overfit_gap", "loss_rises", "repetition", "language", "latency_p95_ms", "rss_mb"}
)
"""Figures that go into the record's scalars under their own name; others become ``final_...``."""
_NAMED_LOSS = 5
FIGURE = Path("figures") / "training_curves.png"


class RecordKeeper(Callback):
    """Writes ``result.json`` at every epoch and exit, ``metrics.jsonl`` at every log interval.

    Args:
        directory: the run directory; its lock is held by this process.
        command: the command line of this launch.
        observer: hears when a record is complete and has not taken its place.
    """

    def __init__(self, directory: RunDirectory, command: Sequence[str], observer: Observer = SILENT) -> None:
        self._directory = directory
        self._command = list(command)
        self._observer = observer
        self.hooks: list[str] = []
        self.record: dict[str, Any] = {}
        self.found_status: str | None = None
        self._trainer: Trainer | None = None
        self.clock = Stopwatch()
        self._earlier: dict[str, float] = {}
        self._began = time.perf_counter()
        self._metrics: MetricsLog | None = None
        self._conclusion: dict[str, Any] | None = None
        self._marks: list[dict[str, float]] = []

    @property
    def launch(self) -> int:
        """The number of this launch, from 1."""
        return int(self.record["provenance"]["launches"])

    def start(self, found: dict[str, Any]) -> None:
        """Take up the record found in the directory, or begin one; a completed one stays as it is."""
        self.found_status = found.get("status")
        if self.found_status == "completed":
            self.record = found
            return
        directory = self._directory
        self.record = new_record(
            directory.config,
            experiment_id=directory.experiment_id,
            config_hash=directory.config_hash,
            init_digest=directory.init_digest,
            command=self._command,
            earlier=found or None,
        )
        self._earlier = dict(found.get("timing", {}).get("seconds", {}))
        self._marks = list(found.get("timing", {}).get("evaluations", []))
        self._write()

    def attach(self, trainer: Trainer, preflight: dict[str, Any], machine: dict[str, Any]) -> None:
        """Follow ``trainer`` from here on."""
        self._trainer = trainer
        self.record["gate"]["preflight"] = preflight
        self.record["provenance"]["machine"] = machine
        self.record["provenance"]["hook_list"] = self.hooks

    # -- callbacks -------------------------------------------------------------------------

    def on_train_start(self, state: LoopState) -> None:
        """Cut the log and the samples back to the step that training starts from."""
        self._metrics = MetricsLog(self._directory.path / METRICS_FILE)
        due = self._trainer is not None and self._trainer.state.evaluation_due
        logged = self._metrics.cut_back(state.step, evaluation_due=due)
        cut_back_samples(self._directory.path / SAMPLES_DIRECTORY, state.step)
        done = {each["step"] for each in self._trainer.state.evaluations} if self._trainer is not None else set()
        self._marks = [mark for mark in self._marks if mark["step"] in done]
        if state.step or logged:
            where = f"after step {state.step}"
            if logged > state.step:
                where += f"; steps {state.step + 1} to {logged} were not saved and are repeated"
            say("resume", where)
        self._update()

    def on_log(self, state: LoopState, line: dict[str, Any]) -> None:
        """Append the line, with the run's identity."""
        self._append(line)

    def on_evaluate(self, state: LoopState, evaluation: dict[str, Any]) -> None:
        """Append the evaluation's figures and its first sample; all samples go into a file of their own."""
        line = {"step": evaluation["step"], "epoch": evaluation["epoch"], "gate_passed": evaluation.get("passed")}
        if samples := evaluation.get("samples"):
            line["sample"] = samples[0]
            self._write_samples(f"step_{evaluation['step']:07d}.txt", samples)
        if "val_loss" in evaluation.get("metrics", {}) and self._trainer is not None:
            # Beside each other in one line, for whoever watches them part.
            line["loss"] = self._trainer.state.train_loss[-1]
        self._append({**line, **evaluation.get("metrics", {})})
        if self._trainer is not None:
            seconds = self._earlier.get("training", 0.0) + self._trainer.clock.so_far("training")
            self._marks.append({"step": evaluation["step"], "training_seconds": seconds})

    def on_epoch_end(self, state: LoopState) -> None:
        """Bring the record up to the epoch."""
        self._update()

    def conclude(self, evaluation: dict[str, Any]) -> None:
        """Take the last judgement of the finished model for the record's verdict."""
        self._conclusion = evaluation
        if samples := evaluation.get("samples"):
            self._write_samples("validation.txt", samples)

    # -- the end ---------------------------------------------------------------------------

    def finish(self, status: str, reason: str | None) -> None:
        """Write the final record of this launch, and the figure."""
        if not self.record or self.found_status == "completed":
            return
        self.record["status"] = status
        self.record["reason"] = reason
        self.record["finished_at"] = None if status == "preempted" else timestamp()
        if self._trainer is not None:
            self._fill(self._trainer)
        self._write()
        # After the record, whose status must not wait for it; a preempted run has no time for it.
        if status != "preempted" and self.record["curves"]["train_loss"]:
            self._draw()

    def _draw(self) -> None:
        path = self._directory.path / FIGURE
        try:
            # Imported here: matplotlib takes longer than the rest of the start-up, on every rank.
            importlib.import_module("accel_train.runs.figures").training_curves(self.record, path)
        except Exception as error:
            log.warning("%s could not be drawn (%s); the record is complete without it", path, error)
            log.info("the traceback:", exc_info=True)

    def summary(self) -> str:
        """One line for people: the verdict, the figures it rests on, and what they cost."""
        scalars, gate = self.record["metrics"]["scalars"], self.record["gate"]
        if gate["passed"] is None:
            verdict = "no gate was judged"
        elif gate["passed"]:
            figures = [f"{row['metric']} {row['value']:.4f}" for row in gate["criteria"]]
            verdict = f"gate passed after epoch {gate['epoch']}: {', '.join(figures)}"
        else:
            verdict = f"gate not passed after epoch {gate['epoch']}: {gate['failure_reason']}"
        if "val_bits_per_byte" in scalars:
            verdict += f"; {scalars['val_bits_per_byte']:.4f} bits per byte"
        seconds = self.record["timing"]["seconds"].get("total", 0.0)
        return f"{verdict} ({scalars.get('steps_trained', 0)} steps, {seconds:.1f} s)"

    def _update(self) -> None:
        if self._trainer is not None:
            self._fill(self._trainer)
        self._write()

    def _fill(self, trainer: Trainer) -> None:
        record, state = self.record, trainer.state
        evaluations = state.evaluations
        named = {name for evaluation in evaluations for name in evaluation.get("metrics", {})}
        curves = {
            name: [evaluation.get("metrics", {}).get(name) for evaluation in evaluations] if name in named else []
            for name in (*_WALK_CURVES, *(name for name in _TEXT_CURVES if name in named))
        }
        if "val_loss" in named:
            curves["evaluation_step"] = [evaluation["step"] for evaluation in evaluations]
        record["curves"] = {"train_loss": list(state.train_loss), **curves}
        record["metrics"]["scalars"] = self._scalars(trainer, evaluations)
        # Also without an evaluation: those of steps that were rolled back must not stay.
        last = evaluations[-1] if evaluations else {}
        verdict = self._conclusion or last
        record["gate"].update(
            passed=verdict.get("passed"),
            epoch=last.get("epoch"),
            criteria=verdict.get("criteria", []),
            evidence=verdict.get("evidence", {}),
            failure_reason=verdict.get("failure_reason"),
            first_passed_epoch=next((e["epoch"] for e in evaluations if e.get("passed")), None),
        )
        provenance = record["provenance"]
        provenance["world_sizes"] = list(state.world_sizes)
        provenance["resumes"] = list(state.resumes)
        provenance["data_fingerprint"] = state.fingerprint_hex
        self._fill_timing(trainer)

    def _scalars(self, trainer: Trainer, evaluations: list[dict[str, Any]]) -> dict[str, Any]:
        state = trainer.state
        last = evaluations[-1].get("metrics", {}) if evaluations else {}
        verdict = self._conclusion or (evaluations[-1] if evaluations else {})
        # Compliance stands in every record, judged or not.
        final = {"edge_compliance": None, "rule_compliance": None}
        final |= {name: value for name, value in last.items() if name not in _OWN_NAME}
        return {
            "final_train_loss": state.train_loss[-1] if state.train_loss else None,
            **{f"final_{name}": value for name, value in final.items()},
            **{name: value for name, value in verdict.get("metrics", {}).items() if name in _OWN_NAME},
            **self._best(evaluations),
            "gate_passed": bool(verdict.get("passed")),
            "epochs_trained": state.step / trainer.plan.steps_per_epoch,
            "steps_trained": state.step,
            "skipped_steps": state.skipped_steps,
            "tokens_seen": state.tokens_seen,
            "parameters": sum(p.numel() for p in trainer.unwrapped_model.parameters()),
        }

    def _best(self, evaluations: list[dict[str, Any]]) -> dict[str, Any]:
        """The lowest validation loss, and the seconds of training until it first was below 5; nothing without one."""
        found = {each["step"]: each.get("metrics", {}).get("val_loss") for each in evaluations}
        losses = {step: loss for step, loss in found.items() if loss is not None}
        if not losses:
            return {}
        reached = next((step for step, loss in losses.items() if loss < _NAMED_LOSS), None)
        seconds = next(
            (mark["training_seconds"] for mark in self._marks if reached is not None and mark["step"] >= reached), None
        )
        return {"best_val_loss": min(losses.values()), f"seconds_to_val_loss_{_NAMED_LOSS}": seconds}

    def _fill_timing(self, trainer: Trainer) -> None:
        launch = {**self.clock.seconds, **trainer.clock.seconds, "total": time.perf_counter() - self._began}
        names = {**self._earlier, **launch}
        seconds = {name: self._earlier.get(name, 0.0) + launch.get(name, 0.0) for name in names}
        training = trainer.clock.seconds.get("training", 0.0)
        trained = trainer.state.tokens_seen - trainer.tokens_at_start
        self.record["timing"] = {
            "seconds": seconds,
            "tokens_per_second": trained / training if training else None,
            "evaluations": list(self._marks),
        }

    def _write_samples(self, name: str, samples: Sequence[str]) -> None:
        path = self._directory.path / SAMPLES_DIRECTORY / name
        path.parent.mkdir(exist_ok=True)
        write_atomic(path, "\n\n".join(samples).encode() + b"\n")

    def _append(self, line: dict[str, Any]) -> None:
        assert self._metrics is not None, "on_train_start comes first"
        record = self.record
        identity = {
            "run_id": record["run_id"],
            "config_hash": record["config_hash"],
            "git_commit": record["provenance"]["git_commit"],
        }
        self._metrics.append({**identity, "time": timestamp(), **line})

    def _write(self) -> None:
        write_record(self._directory.path, self.record, self._observer)
