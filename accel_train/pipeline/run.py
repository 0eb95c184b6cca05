"""The phases of ``accel-train pipeline``: from a corpus to a validated model with one command.

Five phases: prerequisites, corpus, tokenizer, training, validation. Each finds out by digests what
is there already, does what is missing, and goes on with what was interrupted; the same command
again does nothing twice. The exit code names the phase that failed (see :mod:`accel_train.errors`).
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from accel_train import errors
from accel_train.checkpoints.manifest import list_checkpoints, read_manifest, require_data, step_directory, verify
from accel_train.config.sections import SHARED_CORPORA, EarlierRun, ExperimentConfig
from accel_train.files.atomic import write_atomic
from accel_train.pipeline import reports
from accel_train.pipeline.command import OPTIONS_FILE, PHASES, as_option, kept_options, print_heading
from accel_train.pipeline.prerequisites import check_space, read_configuration, record_of, run_dir_of
from accel_train.process.console import print_line, say
from accel_train.process.fault_points import REPORT_BEGUN
from accel_train.process.signals import StopSignal, tied_to_this_process
from accel_train.process.work import WorkContext
from accel_train.runs import experiment
from accel_train.runs.directory import dump_config
from accel_train.runs.record import RunRecord, strict_json
from accel_train.runs.use import evaluate, saved_data
from accel_train.tasks.text.task import TextTask

METRICS_FILE = "training_metrics.json"
REPORT_FILE = "validation_report.json"
_POLL_SECONDS = 0.05


class Pipeline:
    """The phases of one call.

    Args:
        options: checked, with those of an earlier call where that is resumed.
        reached: hears of every fault point.
        began: when the first phase began, on the clock of ``time.perf_counter``.
    """

    def __init__(self, options: argparse.Namespace, reached: Callable[[str], None], began: float) -> None:
        self._options, self._began = options, began
        self._out = Path(options.output_dir)
        self._work = WorkContext(say, reached=reached)

    def run(self) -> int:
        """Run the phases; returns the exit code."""
        with self._phase(errors.EXIT_PREREQUISITES, self._began):
            config = read_configuration(self._options)
            check_space(config, self._out)
            self._keep_options()
        stop = StopSignal()
        try:
            with stop.installed():
                work = replace(self._work, should_stop=lambda: stop.requested)
                task = self._prepare(config, work)
                work.check()
            self._train(config, task)
            with stop.installed():
                return self._validate(config, task)
        except (errors.Interrupted, KeyboardInterrupt):
            again = "with --resume instead of --fresh" if self._options.fresh else "again"
            print_line(f"interrupted: run the same command {again} to go on")
            return errors.EXIT_PREEMPTED

    @contextmanager
    def _phase(self, code: int, began: float | None = None) -> Iterator[None]:
        """One phase with its heading (unless it ``began`` before); what people can act on ends it with its ``code``."""
        if began is None:
            began = time.perf_counter()
            print_heading(code)
        try:
            yield
        except (errors.PhaseFailed, errors.Interrupted):
            raise
        except errors.ConfigError as error:
            # What is there but is no text cannot be tokenized, whenever that was noticed.
            chosen = errors.EXIT_TOKENIZER if getattr(error.__cause__, "is_content", False) else code
            raise errors.PhaseFailed(f"{as_option(error.field)}: {error.value} {error.rule}", chosen) from error
        except (errors.RunError, OSError, MemoryError) as error:
            cure = "; train anew with --fresh" if isinstance(error, errors.CheckpointMismatch) else ""
            raise errors.PhaseFailed(f"{error}{cure}" if str(error) else type(error).__name__, code) from error
        print_line(f"{'done':<10} {PHASES[code].lower()} in {time.perf_counter() - began:.1f} s")

    def _keep_options(self) -> None:
        """For the next ``--resume``; only options that make a configuration come so far."""
        self._publish(self._out / OPTIONS_FILE, kept_options(self._options))

    def _publish(self, path: Path, content: bytes) -> None:
        """Write a file that other pipelines in this output directory may be writing too; the last one stays."""
        with FileLock(self._out / ".pipeline.lock"):
            write_atomic(path, content)

    # -- corpus and tokenizer --------------------------------------------------------------

    def _prepare(self, config: ExperimentConfig, work: WorkContext) -> TextTask:
        task = TextTask(config)
        shared, preparation = self._out / SHARED_CORPORA, task.preparation
        with self._phase(errors.EXIT_CORPUS):
            if self._options.skip_corpus and (missing := preparation.missing_corpus(shared)):
                raise errors.RunError(f"there is no corpus to go on with ({missing}); leave out --skip-corpus")
            task.check(work)
            corpus = preparation.build_corpus(shared, work)
            _tell_skipped(task, "corpus")
        with self._phase(errors.EXIT_TOKENIZER):
            if self._options.skip_tokenizer and (missing := preparation.missing_tokenizer(corpus, shared)):
                raise errors.RunError(f"there is no tokenizer to go on with ({missing}); leave out --skip-tokenizer")
            tokenizer = preparation.build_tokenizer(corpus, shared, work)
            task.open(str(preparation.build_tokens(corpus, tokenizer, shared, work)))
            _tell_skipped(task, "tokenizer", "tokens")
        return task

    # -- training --------------------------------------------------------------------------

    def _train(self, config: ExperimentConfig, task: TextTask) -> None:
        run_dir = run_dir_of(config)
        with self._phase(errors.EXIT_TRAINING):
            record = record_of(run_dir)
            if record is not None and record.status == "completed" and not self._options.fresh:
                _require_same_data(run_dir, task)
                say("skipped", f"{run_dir} is trained")
            if self._options.launcher is None:
                earlier = EarlierRun(fresh=self._options.fresh)
                code = experiment.run(config, earlier=earlier, command=list(sys.argv), reached=self._work.reached)
            else:
                code = self._launch(config, run_dir)
            if code == errors.EXIT_PREEMPTED:
                raise errors.Interrupted
            if code != errors.EXIT_OK:
                raise errors.RunError(_why_training_failed(run_dir))

    def _launch(self, config: ExperimentConfig, run_dir: Path) -> int:
        """Train in the processes that ``--launcher`` starts; the record says what came of it, launchers do not."""
        # A name of its own: pipelines with other options may share the output directory.
        path = self._out / f"{run_dir.name}.yaml"
        self._publish(path, dump_config(config).encode())
        line = [*shlex.split(self._options.launcher), "-m", "accel_train.commands.main", "train", "--config", str(path)]
        line += ["--fresh"] if self._options.fresh else []
        say("launch", shlex.join(line))
        before = _launch_of(record_of(run_dir))
        stop, told = StopSignal(), False
        with stop.installed():
            process = subprocess.Popen(tied_to_this_process(line))
            while process.poll() is None:
                if stop.requested and not told:
                    process.terminate()
                    told = True
                time.sleep(_POLL_SECONDS)
        after = record_of(run_dir)
        # What a launch before this one has left says nothing about this one.
        is_new = _launch_of(after) != before
        status = None if after is None else after.status
        if status == "completed" and (is_new or process.returncode == 0):
            return errors.EXIT_OK
        if stop.requested or (is_new and status == "preempted"):
            return errors.EXIT_PREEMPTED
        if not is_new:
            what = f"--launcher: {line[0]} ended with code {process.returncode}"
            raise errors.RunError(f"{what} before training began; see above, and check it")
        return errors.EXIT_TRAINING

    # -- validation ------------------------------------------------------------------------

    def _validate(self, config: ExperimentConfig, task: TextTask) -> int:
        run_dir = run_dir_of(config)
        with self._phase(errors.EXIT_VALIDATION):
            found = record_of(run_dir)
            assert found is not None, "a finished run has a record"
            record, checkpoint = found.to_dict(), _final_checkpoint(run_dir, found)
            gate = record["gate"]
            if gate["evidence"].get("weights_sha256") == checkpoint["weights_sha256"]:
                say("verified", f"{checkpoint['path']}: these weights were judged")
            else:
                gate = evaluate(run_dir)
            scalars = record["metrics"]["scalars"]
            metrics = reports.training_metrics(record, run_dir)
            report = reports.validation_report(gate, scalars, run_dir, checkpoint)
            # With the run, and for convenience where the user looks first: there it is the last run's.
            for directory in (run_dir, self._out):
                self._write(directory / METRICS_FILE, metrics)
                self._write(directory / REPORT_FILE, report)
            for line in reports.verdict_lines(gate, scalars):
                say(*line)
        self._summarise(run_dir, checkpoint["path"])
        if not gate["passed"]:
            reason = f"the model does not pass: {gate['failure_reason']}; {reports.advice(task.advice, gate)}"
            raise errors.PhaseFailed(reason, errors.EXIT_VALIDATION)
        print_line(f"\nsuccess in {time.perf_counter() - self._began:.1f} s")
        return errors.EXIT_OK

    def _write(self, path: Path, values: Mapping[str, Any]) -> None:
        self._work.reached(REPORT_BEGUN)
        text = json.dumps(json.loads(strict_json(values, path.name)), indent=1, ensure_ascii=False)
        self._publish(path, text.encode() + b"\n")

    def _summarise(self, run_dir: Path, checkpoint: str) -> None:
        print_line("\nartifacts")
        made = ("result.json", "figures/training_curves.png", "samples", METRICS_FILE, REPORT_FILE)
        paths = [Path(checkpoint) / name for name in ("model.safetensors", "tokenizer.json")]
        for path in [*paths, *(run_dir / name for name in made)]:
            if path.exists():
                files = path.rglob("*") if path.is_dir() else [path]
                size = sum(each.stat().st_size for each in files if each.is_file())
                print_line(f"  {size / 1e3:>10,.1f} kB  {path}")
        print_line(f'\ntry it: accel-train generate {run_dir} --prompt "The"')


def _tell_skipped(task: TextTask, *names: str) -> None:
    if not any(name in task.preparation.built for name in names):
        say("skipped", "nothing to do: what is there was verified")


def _require_same_data(run_dir: Path, task: TextTask) -> None:
    """Refuse a finished run whose corpus is another by now: its model knows nothing of it."""
    found = list_checkpoints(run_dir / "checkpoints")
    # A damaged one is told of by the validation.
    if found and not verify(found[-1][1]):
        step, checkpoint = found[-1]
        require_data(saved_data(checkpoint), task.digests(), step, "train anew")


def _final_checkpoint(run_dir: Path, record: RunRecord) -> dict[str, Any]:
    path = run_dir / "checkpoints" / step_directory(int(record.metrics.scalars["steps_trained"] or 0))
    if problems := verify(path):
        reason = f"the trained model is damaged: {path}: {'; '.join(problems)}"
        raise errors.RunError(f"{reason}; put the file back, or train again with --fresh")
    return {"path": str(path), "weights_sha256": read_manifest(path)["files"]["model.safetensors"]["sha256"]}


def _why_training_failed(run_dir: Path) -> str:
    """What the record of a run says, and what to do; what would only happen again is not advised."""
    record = record_of(run_dir)
    reason = (record and record.reason) or "see above"
    found = list_checkpoints(run_dir / "checkpoints")
    if "not finite" in reason:
        then = "the same command would come to the same: lower the --learning-rate"
    elif "out of memory" in reason:
        then = "use a smaller --batch-size, --max-seq-length or model (--config)"
    elif found:
        then = f"the checkpoint of step {found[-1][0]} is intact, and the same command goes on from there"
    else:
        then = "nothing was saved yet: the same command begins again"
    log = run_dir / "logs" / "rank_0.log"
    details = f"; {log} has the details" if log.exists() else ""
    return f"training failed: {reason}{details}; {then}"


def _launch_of(record: RunRecord | None) -> tuple[str, int] | None:
    """Which run, and which of its launches, a record tells of."""
    return None if record is None else (record.run_id, record.provenance.launches)
