"""Tells of a run while it trains: what ``result.json`` says at any moment, and what trackers get.

The record is derived from the training state and the last evaluation; nothing is kept here that
a killed run would miss, except the seconds, which are those of all launches that left by
themselves.
"""

from __future__ import annotations

import importlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from accel_train.files.atomic import write_atomic
from accel_train.model.size import count_parameters
from accel_train.process.console import say
from accel_train.process.stopwatch import Stopwatch
from accel_train.process.work import WorkContext
from accel_train.runs.directory import RunDirectory
from accel_train.runs.metrics_log import METRICS_FILE, SAMPLES_DIRECTORY, MetricsLog, cut_back_samples
from accel_train.runs.provenance import timestamp
from accel_train.runs.record import CriterionResult, RunRecord, new_record, write_record
from accel_train.tasks.base import Task
from accel_train.training.callbacks import Callback, LoopState
from accel_train.training.trainer import Trainer

log = logging.getLogger(__name__)

FIGURE = Path("figures") / "training_curves.png"


class Recorder(Callback):
    """Writes ``result.json`` at every epoch and exit, ``metrics.jsonl`` at every log interval.

    Args:
        directory: the run directory; its lock is held by this process before :meth:`start`.
        task: names curves and scalars.
        command: the command line of this launch.
        work: hears when a record is complete and has not taken its place.
    """

    def __init__(self, directory: RunDirectory, task: Task, command: Sequence[str], work: WorkContext) -> None:
        self.directory, self._task, self._command, self._work = directory, task, list(command), work
        self.clock = Stopwatch()
        """Seconds of the phases before and after training."""
        self._record: RunRecord | None = None
        self._trainer: Trainer | None = None
        self._metrics = MetricsLog(directory.path / METRICS_FILE)
        self._earlier: dict[str, float] = {}
        self._began = time.perf_counter()
        self._conclusion: dict[str, Any] | None = None
        self._marks: list[dict[str, float]] = []
        self._was_completed = False

    @property
    def record(self) -> RunRecord:
        """The record; after :meth:`start`."""
        assert self._record is not None, "start() comes first"
        return self._record

    def start(self, found: RunRecord | None) -> None:
        """Take up the record found in the directory, or begin one; a completed one stays as it is."""
        if found is not None and found.status == "completed":
            self._record, self._was_completed = found, True
            return
        config, digest = self.directory.config, self.directory.init_digest
        self._record = new_record(config, self._task, init_digest=digest, command=self._command, earlier=found)
        if found is not None:
            self._earlier, self._marks = dict(found.timing.seconds), list(found.timing.evaluations)
        self._write()

    def follow(self, trainer: Trainer, preflight: dict[str, Any], machine: dict[str, Any], hooks: list[str]) -> None:
        """Record ``trainer`` from here on.

        Args:
            trainer: its callbacks hold this recorder.
            preflight: what the gate can reach.
            machine: what decides the bits.
            hooks: names of the hooks in force.
        """
        self._trainer = trainer
        self.record.gate.preflight = preflight
        self.record.provenance.machine = machine
        self.record.provenance.hook_list = hooks

    # -- callbacks -------------------------------------------------------------------------

    def on_train_start(self, state: LoopState) -> None:
        """Cut the log and the samples back to the step that training starts from."""
        training = self._trainer.state if self._trainer is not None else None
        due = training is not None and training.evaluation_due
        logged = self._metrics.cut_back(state.step, evaluation_due=due)
        cut_back_samples(self.directory.path / SAMPLES_DIRECTORY, state.step)
        done = {each["step"] for each in training.evaluations} if training is not None else set()
        self._marks = [mark for mark in self._marks if mark["step"] in done]
        if state.step or logged:
            where = f"after step {state.step}"
            if logged > state.step:
                where += f"; steps {state.step + 1} to {logged} were not saved and are repeated"
            say("resume", where)
        self._write()

    def on_log(self, state: LoopState, line: dict[str, Any]) -> None:
        """Append the line, with the run's identity."""
        record, commit = self.record, self.record.provenance.git_commit
        identity = {"run_id": record.run_id, "config_hash": record.config_hash, "git_commit": commit}
        self._metrics.append({**identity, "time": timestamp(), **line})

    def on_evaluate(self, state: LoopState, evaluation: dict[str, Any]) -> None:
        """Append the evaluation's figures and its first sample; all samples go into a file of their own."""
        line = {"step": evaluation["step"], "epoch": evaluation["epoch"], "gate_passed": evaluation.get("passed")}
        if samples := evaluation.get("samples"):
            line["sample"] = samples[0]
            self._write_samples(f"step_{evaluation['step']:07d}.txt", samples)
        if "val_loss" in evaluation.get("metrics", {}) and self._trainer is not None:
            # Beside each other in one line, for whoever watches them part.
            line["loss"] = self._trainer.state.train_loss[-1]
        self.on_log(state, {**line, **evaluation.get("metrics", {})})
        if self._trainer is not None:
            seconds = self._earlier.get("training", 0.0) + self._trainer.clock.so_far("training")
            self._marks.append({"step": evaluation["step"], "training_seconds": seconds})

    def on_epoch_end(self, state: LoopState) -> None:
        """Bring the record up to the epoch."""
        self._write()

    def conclude(self, evaluation: dict[str, Any]) -> None:
        """Take the last judgement of the finished model for the record's verdict."""
        self._conclusion = evaluation
        if samples := evaluation.get("samples"):
            self._write_samples("validation.txt", samples)

    # -- the end ---------------------------------------------------------------------------

    def finish(self, status: str, reason: str | None) -> None:
        """Write the final record of this launch, and the figure; nothing before :meth:`start`."""
        if self._record is None or self._was_completed:
            return
        self._record.status = status  # type: ignore[assignment] # one of the four
        self._record.reason = reason
        self._record.finished_at = None if status == "preempted" else timestamp()
        self._write()
        # After the record, whose status must not wait for it; a preempted run has no time for it.
        if status != "preempted" and self._record.curves["train_loss"]:
            self._draw()

    def _draw(self) -> None:
        path = self.directory.path / FIGURE
        try:
            # Imported here: matplotlib takes longer than the rest of the start-up, on every rank.
            figures = importlib.import_module("accel_train.runs.figures")
            figures.training_curves(self._task, self.record.to_dict(), path)
        except Exception as error:
            log.warning("%s could not be drawn (%s); the record is complete without it", path, error)
            log.info("the traceback:", exc_info=True)

    def summary(self) -> str:
        """Return one line for people: the verdict, the figures it rests on, and what they cost."""
        scalars, gate = self.record.metrics.scalars, self.record.gate
        if gate.passed is None:
            verdict = "no gate was judged"
        elif gate.passed:
            figures = [f"{row.metric} {row.value:.4f}" for row in gate.criteria]
            verdict = f"gate passed after epoch {gate.epoch}: {', '.join(figures)}"
        else:
            verdict = f"gate not passed after epoch {gate.epoch}: {gate.failure_reason}"
        seconds = self.record.timing.seconds.get("total", 0.0)
        own = {name: words for name, words in self._task.headline.items() if name in self._task.own_scalars}
        shown = [f"{scalars[name]:.4f} {words}" for name, words in own.items() if scalars.get(name) is not None]
        return f"{'; '.join([verdict, *shown])} ({scalars.get('steps_trained', 0)} steps, {seconds:.1f} s)"

    def _fill(self, trainer: Trainer) -> None:
        record, state, evaluations = self.record, trainer.state, trainer.state.evaluations
        figures = [evaluation.get("metrics", {}) for evaluation in evaluations]
        losses = {name for each in figures for name in each if name.endswith("_loss")}
        names = [*self._task.curves, *sorted(losses - {*self._task.curves})]
        measured = {name: [each.get(name) for each in figures] for name in names}
        steps = [evaluation["step"] for evaluation in evaluations]
        record.curves = {"train_loss": list(state.train_loss), **measured, "evaluation_step": steps}
        # Also without an evaluation: those of steps that were rolled back must not stay.
        last = evaluations[-1] if evaluations else {}
        verdict = self._conclusion or last
        record.metrics.scalars = self._scalars(trainer, last, verdict)
        gate = record.gate
        gate.passed, gate.epoch = verdict.get("passed"), last.get("epoch")
        gate.criteria = [CriterionResult(**row) for row in verdict.get("criteria", [])]
        gate.evidence, gate.failure_reason = verdict.get("evidence", {}), verdict.get("failure_reason")
        gate.first_passed_epoch = next((each["epoch"] for each in evaluations if each.get("passed")), None)
        record.provenance.world_sizes = list(state.world_sizes)
        record.provenance.resumes = list(state.resumes)
        record.provenance.data_fingerprint = state.fingerprint_hex
        self._fill_timing(trainer)

    def _scalars(self, trainer: Trainer, last: dict[str, Any], verdict: dict[str, Any]) -> dict[str, Any]:
        state, own = trainer.state, self._task.own_scalars
        return {
            "final_train_loss": state.train_loss[-1] if state.train_loss else None,
            # What a column shows stands in every record, measured or not.
            **dict.fromkeys(self._task.columns.values()),
            **{f"final_{name}": value for name, value in last.get("metrics", {}).items() if name not in own},
            **{name: value for name, value in verdict.get("metrics", {}).items() if name in own},
            **self._task.scalars(state.evaluations, self._marks),
            "gate_passed": bool(verdict.get("passed")),
            "epochs_trained": state.step / trainer.plan.steps_per_epoch,
            "steps_trained": state.step,
            "skipped_steps": state.skipped_steps,
            "tokens_seen": state.tokens_seen,
            "parameters": count_parameters(trainer.unwrapped_model),
        }

    def _fill_timing(self, trainer: Trainer) -> None:
        launch = {**self.clock.seconds, **trainer.clock.seconds, "total": time.perf_counter() - self._began}
        training = trainer.clock.seconds.get("training", 0.0)
        trained = trainer.state.tokens_seen - trainer.tokens_at_start
        names = {**self._earlier, **launch}
        timing = self.record.timing
        timing.seconds = {name: self._earlier.get(name, 0.0) + launch.get(name, 0.0) for name in names}
        timing.tokens_per_second = trained / training if training else None
        timing.evaluations = list(self._marks)

    def _write_samples(self, name: str, samples: Sequence[str]) -> None:
        path = self.directory.path / SAMPLES_DIRECTORY / name
        path.parent.mkdir(exist_ok=True)
        write_atomic(path, "\n\n".join(samples).encode() + b"\n")

    def _write(self) -> None:
        """Write the record, with the state of the trainer if it follows one."""
        if self._trainer is not None:
            self._fill(self._trainer)
        write_record(self.directory.path, self.record, self._work.reached)


class Trackers(Callback):
    """Sends every log line and every evaluation to Accelerate's trackers.

    Args:
        accelerator: made with the trackers.
        project: project name given to them.
        config: hyperparameters, as nested JSON values.
    """

    def __init__(self, accelerator: Accelerator, project: str, config: Mapping[str, Any]) -> None:
        self._accelerator = accelerator
        accelerator.init_trackers(project, dict(_flat(config)))

    def on_log(self, state: LoopState, line: dict[str, Any]) -> None:
        """Send the figures of a log interval."""
        self._accelerator.log({k: v for k, v in line.items() if k != "step"}, step=line["step"])

    def on_evaluate(self, state: LoopState, evaluation: dict[str, Any]) -> None:
        """Send the figures of an evaluation."""
        figures = {k: v for k, v in evaluation.get("metrics", {}).items() if v is not None}
        self._accelerator.log(figures, step=evaluation["step"])


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, int | float | str]]:
    """Dotted names and plain values, as trackers want their hyperparameters."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value if isinstance(value, int | float | str) else str(value)
