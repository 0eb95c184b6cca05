"""``accel-train pipeline``: from a corpus to a validated model with one command.

Five phases: prerequisites, corpus, tokenizer, training, validation. Each finds out by digests what
is there already, does what is missing, and goes on with what was interrupted; the same command
again does nothing twice. The exit code names the phase that failed:

    0 success   1 prerequisites (and the command line)   2 corpus   3 tokenizer   4 training
    5 validation   75 interrupted, with everything saved: the same command goes on

Nothing that needs more than the standard library is imported until the prerequisites have been looked at, so that
a missing package is an error for people.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from accel_train.errors import (
    EXIT_CORPUS,
    EXIT_OK,
    EXIT_PREEMPTED,
    EXIT_PREREQUISITES,
    EXIT_TOKENIZER,
    EXIT_TRAINING,
    EXIT_VALIDATION,
    PhaseFailed,
)
from accel_train.pipeline import prerequisites
from accel_train.pipeline import reports as pipeline_report
from accel_train.pipeline.phases import as_option, print_line, say
from accel_train.pipeline.prerequisites import OPTIONS_FILE, record_of, run_dir_of
from accel_train.process.signals import StopSignal, leaving_on_stop_signals, tied_to_this_process

if TYPE_CHECKING:
    from accel_train.config.sections import ExperimentConfig
    from accel_train.process.fault_points import Observer
    from accel_train.tasks.text.task import TextTask

PHASES = ("Prerequisites", "Corpus", "Tokenizer", "Training", "Validation")
METRICS_FILE = "training_metrics.json"
REPORT_FILE = "validation_report.json"

_POLL_SECONDS = 0.05
_NOT_KEPT = ("resume", "fresh", "output_dir", "skip_corpus", "skip_tokenizer")


def pipeline_main(argv: Sequence[str] | None = None, *, observer: Observer | None = None) -> int:
    """Run the pipeline; returns the exit code.

    Args:
        argv: options; by default those of this process.
        observer: hears of every point at which a fault may fall.
    """
    try:
        with leaving_on_stop_signals(EXIT_PREEMPTED):
            options = _parser().parse_args(sys.argv[1:] if argv is None else list(argv))
            return _Pipeline(options, observer).run()
    except PhaseFailed as failure:
        print(f"accel-train pipeline: error: {failure}", file=sys.stderr)
        return failure.exit_code


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise PhaseFailed(EXIT_PREREQUISITES, f"{message}; see --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="accel-train pipeline",
        description="Corpus, tokenizer, training, validation: one command. Run it again to go on, or to see that "
        "nothing is left to do.",
        epilog="exit codes: 0 success, 1 prerequisites, 2 corpus, 3 tokenizer, 4 training, 5 validation (a criterion "
        "was missed, or the model is damaged), 75 interrupted: the same command goes on",
        allow_abbrev=False,
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--corpus-path", metavar="PATH", help="text file, or directory of *.txt files")
    source.add_argument("--corpus-url", metavar="URL", help="text file on the network (default: a built-in corpus)")
    parser.add_argument("--corpus-sha256", metavar="HEX", help="digest that the corpus must have")
    parser.add_argument("--tokenizer", choices=["char", "bpe", "unigram"], help="kind of tokenizer")
    parser.add_argument("--vocab-size", type=int, metavar="N", help="vocabulary of the tokenizer")
    parser.add_argument("--epochs", type=int, metavar="N", help="epochs of training")
    parser.add_argument("--batch-size", type=int, metavar="N", help="windows per step")
    parser.add_argument("--learning-rate", type=float, metavar="X", help="peak learning rate")
    parser.add_argument("--max-seq-length", type=int, metavar="N", help="context length in tokens")
    parser.add_argument("--seed", type=int, metavar="N", help="seed of everything random")
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="YAML of the text task that the options change (default: text_quick.yaml for the built-in corpus, "
        "text_default.yaml for any other)",
    )
    parser.add_argument(
        "--launcher",
        metavar="COMMAND",
        help="what starts the processes of training, such as 'accelerate launch --multi_gpu --num_processes 4' "
        "(default: this process trains)",
    )
    parser.add_argument(
        "--output-dir", metavar="DIR", default="results", help="where everything goes (default: results)"
    )
    parser.add_argument(
        "--skip-corpus", action="store_true", help="neither fetch nor make a corpus: it must be there already"
    )
    parser.add_argument("--skip-tokenizer", action="store_true", help="train no tokenizer: it must be there already")
    parser.add_argument(
        "--resume", action="store_true", help="go on with the options of the last call in this output directory"
    )
    parser.add_argument("--fresh", action="store_true", help="archive the earlier training run and train again")
    return parser


class _Pipeline:
    """The phases of one call."""

    def __init__(self, options: argparse.Namespace, observer: Observer | None) -> None:
        self._options = options
        self._out = Path(options.output_dir)
        self._observer = observer
        self._began = time.perf_counter()

    def run(self) -> int:
        """All phases; returns the exit code."""
        with self._phase(0):
            prerequisites.check_python()
            prerequisites.check_output(self._options)
            prerequisites.recall(self._options)
            prerequisites.check_options(self._options)
            config = self._configuration()
            with self._failing(EXIT_PREREQUISITES):
                prerequisites.check_space(config, self._out)
            self._keep_options()
        # From here on everything is installed.
        interrupt = importlib.import_module("accel_train.process.work")
        stop = StopSignal()
        try:
            with stop.installed():
                task = self._prepare(config, lambda: stop.requested)
                # Here, where a signal is waited for: it takes seconds.
                importlib.import_module("accel_train.runs.experiment")
                if stop.requested:
                    raise interrupt.Interrupted
            self._train(config, task)
            with stop.installed():
                return self._validate(config, task)
        except (interrupt.Interrupted, KeyboardInterrupt):
            again = "with --resume instead of --fresh" if self._options.fresh else "again"
            print_line(f"interrupted: run the same command {again} to go on")
            return EXIT_PREEMPTED

    @contextmanager
    def _phase(self, number: int) -> Iterator[None]:
        name, began = PHASES[number], time.perf_counter()
        print_line(f"\n== {number + 1}/{len(PHASES)} {name} {'=' * (60 - len(name))}")
        yield
        print_line(f"{'done':<10} {name.lower()} in {time.perf_counter() - began:.1f} s")

    # -- configuration ---------------------------------------------------------------------

    def _keep_options(self) -> None:
        """For the next ``--resume``; only options that make a configuration come so far."""
        kept = {name: value for name, value in vars(self._options).items() if name not in _NOT_KEPT}
        given = {name: value for name, value in kept.items() if value is not None}
        try:
            self._publish(self._out / OPTIONS_FILE, json.dumps(given, indent=1).encode() + b"\n")
        except OSError as error:
            raise PhaseFailed(EXIT_PREREQUISITES, f"{error.filename or self._out}: {error.strerror}") from error

    def _publish(self, path: Path, content: bytes) -> None:
        """Write a file that other pipelines in this output directory may be writing too; the last one stays."""
        lock = importlib.import_module("filelock").FileLock(self._out / ".pipeline.lock")
        with lock:
            importlib.import_module("accel_train.files.atomic").write_atomic(path, content)

    def _configuration(self) -> ExperimentConfig:
        """The example that fits, changed by the options."""
        options, config = self._options, importlib.import_module("accel_train.config.sections")
        own_corpus = options.corpus_path or options.corpus_url
        file = Path(options.config or _example("text_default.yaml" if own_corpus else "text_quick.yaml"))
        cli = importlib.import_module("accel_train.commands.main")
        chosen = {
            "task": "text",
            "text.corpus": own_corpus,
            "text.corpus_sha256": options.corpus_sha256,
            "text.tokenizer": options.tokenizer,
            "text.vocab_size": options.vocab_size,
            "training.max_epochs": options.epochs,
            "training.batch_size": options.batch_size,
            "training.learning_rate": options.learning_rate,
            "model.max_seq_len": options.max_seq_length,
            "seed": options.seed,
            "output_dir": str(self._out),
        }
        arguments = [f"--{name}={value}" for name, value in chosen.items() if value is not None]
        try:
            if cli.parse_config(["--config", str(file)])[0].task != "text":
                rule = "describes another task than text; the examples text_*.yaml and char.yaml are a start"
                raise PhaseFailed(EXIT_PREREQUISITES, f"--config: {file} {rule}")
            parsed: ExperimentConfig = cli.parse_config(["--config", str(file), *arguments])[0]
        except config.ConfigError as error:
            raise PhaseFailed(EXIT_PREREQUISITES, f"{as_option(error.field)}: {error.value!r} {error.rule}") from error
        say("settings", f"{file}{', with ' + ' '.join(arguments[1:-1]) if arguments[1:-1] else ''}")
        return parsed

    # -- corpus and tokenizer --------------------------------------------------------------

    def _prepare(self, config: ExperimentConfig, should_stop: Callable[[], bool]) -> TextTask:
        text = importlib.import_module("accel_train.tasks.text.task")
        observers = {} if self._observer is None else {"observer": self._observer}
        task: TextTask = text.TextTask(config, **observers)
        shared = self._out / importlib.import_module("accel_train.config.sections").SHARED_CORPORA
        with self._phase(1), self._failing(EXIT_CORPUS):
            if self._options.skip_corpus:
                _require(task.preparation.missing_corpus(shared), EXIT_CORPUS, "corpus", "--skip-corpus")
            task.check(say, should_stop)
            corpus = task.preparation.build_corpus(shared, say, should_stop)
            self._tell_skipped(task, "corpus")
        with self._phase(2), self._failing(EXIT_TOKENIZER):
            if self._options.skip_tokenizer:
                missing = task.preparation.missing_tokenizer(corpus, shared)
                _require(missing, EXIT_TOKENIZER, "tokenizer", "--skip-tokenizer")
            tokenizer = task.preparation.build_tokenizer(corpus, shared, say, should_stop)
            task.open(str(task.preparation.build_tokens(corpus, tokenizer, shared, say, should_stop)))
            self._tell_skipped(task, "tokenizer", "tokens")
        return task

    @staticmethod
    def _tell_skipped(task: TextTask, *names: str) -> None:
        if not any(name in task.preparation.built for name in names):
            say("skipped", "nothing to do: what is there was verified")

    @contextmanager
    def _failing(self, code: int) -> Iterator[None]:
        config = importlib.import_module("accel_train.config.sections")
        try:
            yield
        except config.ConfigError as error:
            # What is there but is no text cannot be tokenized, whenever that was noticed.
            chosen = EXIT_TOKENIZER if getattr(error.__cause__, "is_content", False) else code
            raise PhaseFailed(chosen, f"{as_option(error.field)}: {error.value} {error.rule}") from error
        except PhaseFailed:
            raise
        except Exception as error:
            if not isinstance(error, (OSError, MemoryError, *_errors_of_runs())):
                raise
            raise PhaseFailed(code, str(error) or type(error).__name__) from error

    # -- training and validation -----------------------------------------------------------

    def _train(self, config: ExperimentConfig, task: TextTask) -> None:
        run_dir = run_dir_of(config)
        with self._phase(3), self._failing(EXIT_TRAINING):
            if record_of(run_dir).get("status") == "completed" and not self._options.fresh:
                self._require_same_data(run_dir, task)
                say("skipped", f"{run_dir} is trained")
            code = self._train_here(config) if self._options.launcher is None else self._launch(config, run_dir)
            if code == EXIT_PREEMPTED:
                raise importlib.import_module("accel_train.process.work").Interrupted
            if code != EXIT_OK:
                raise PhaseFailed(EXIT_TRAINING, _why_training_failed(run_dir))

    @staticmethod
    def _require_same_data(run_dir: Path, task: TextTask) -> None:
        """Refuse a finished run whose corpus is another by now: its model knows nothing of it."""
        manifest = importlib.import_module("accel_train.checkpoints.manifest")
        found = manifest.list_checkpoints(run_dir / "checkpoints")
        # A damaged one is told of by the validation.
        if found and not manifest.verify(found[-1][1]):
            step, checkpoint = found[-1]
            saved = importlib.import_module("accel_train.runs.use").saved_data(checkpoint)
            manifest.require_data(saved, task.digests(), step, "train anew with --fresh")

    def _train_here(self, config: ExperimentConfig) -> int:
        settings = importlib.import_module("accel_train.config.sections")
        experiment = importlib.import_module("accel_train.runs.experiment")
        observers = {} if self._observer is None else {"observer": self._observer}
        earlier = settings.EarlierRun(fresh=self._options.fresh)
        code: int = experiment.run(config, earlier=earlier, command=list(sys.argv), **observers)
        return code

    def _launch(self, config: ExperimentConfig, run_dir: Path) -> int:
        """Train in the processes that ``--launcher`` starts; the record says what came of it, launchers do not."""
        rundir = importlib.import_module("accel_train.runs.directory")
        # A name of its own: pipelines with other options may share the output directory.
        path = self._out / f"{run_dir.name}.yaml"
        self._publish(path, rundir.dump_config(config).encode())
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
        if after.get("status") == "completed" and (is_new or process.returncode == 0):
            return EXIT_OK
        if stop.requested or (is_new and after.get("status") == "preempted"):
            return EXIT_PREEMPTED
        if not is_new:
            rule = f"ended with code {process.returncode} before training began; see above, and check it"
            raise PhaseFailed(EXIT_TRAINING, f"--launcher: {line[0]} {rule}")
        return EXIT_TRAINING

    def _validate(self, config: ExperimentConfig, task: TextTask) -> int:
        run_dir = run_dir_of(config)
        with self._phase(4), self._failing(EXIT_VALIDATION):
            record = record_of(run_dir)
            checkpoint = self._final_checkpoint(run_dir, record)
            gate = record["gate"]
            if gate["evidence"].get("weights_sha256") == checkpoint["weights_sha256"]:
                say("verified", f"{checkpoint['path']}: these weights were judged")
            else:
                inference = importlib.import_module("accel_train.runs.use")
                gate = inference.evaluate(run_dir)
            scalars = record["metrics"]["scalars"]
            metrics = pipeline_report.training_metrics(record, run_dir)
            report = pipeline_report.validation_report(gate, scalars, run_dir, checkpoint)
            # With the run, and for convenience where the user looks first: there it is the last run's.
            for directory in (run_dir, self._out):
                self._write(directory / METRICS_FILE, metrics)
                self._write(directory / REPORT_FILE, report)
            for line in pipeline_report.verdict_lines(gate, scalars):
                say(*line)
        self._summarise(run_dir, checkpoint["path"])
        if not gate["passed"]:
            raise PhaseFailed(
                EXIT_VALIDATION,
                f"the model does not pass: {gate['failure_reason']}; {pipeline_report.advice(gate)}",
            )
        print_line(f"\nsuccess in {time.perf_counter() - self._began:.1f} s")
        return EXIT_OK

    @staticmethod
    def _final_checkpoint(run_dir: Path, record: Mapping[str, Any]) -> dict[str, Any]:
        manifest = importlib.import_module("accel_train.checkpoints.manifest")
        path = run_dir / "checkpoints" / manifest.step_directory(record["metrics"]["scalars"]["steps_trained"])
        problems = manifest.verify(path)
        if problems:
            raise PhaseFailed(
                EXIT_VALIDATION,
                f"the trained model is damaged: {path}: {'; '.join(problems)}; put the file back, or train again with "
                "--fresh",
            )
        files = manifest.read_manifest(path)["files"]
        return {"path": str(path), "weights_sha256": files["model.safetensors"]["sha256"]}

    def _write(self, path: Path, values: Mapping[str, Any]) -> None:
        if self._observer is not None:
            self._observer.reached(importlib.import_module("accel_train.process.fault_points").REPORT_BEGUN)
        record = importlib.import_module("accel_train.runs.record")
        text = json.dumps(json.loads(record.strict_json(values, path.name)), indent=1, ensure_ascii=False)
        self._publish(path, text.encode() + b"\n")

    def _summarise(self, run_dir: Path, checkpoint: str) -> None:
        print_line("\nartifacts")
        paths = [
            Path(checkpoint) / "model.safetensors",
            Path(checkpoint) / "tokenizer.json",
            run_dir / "result.json",
            run_dir / "figures" / "training_curves.png",
            run_dir / "samples",
            run_dir / METRICS_FILE,
            run_dir / REPORT_FILE,
        ]
        for path in paths:
            if path.exists():
                files = path.rglob("*") if path.is_dir() else [path]
                size = sum(each.stat().st_size for each in files if each.is_file())
                print_line(f"  {size / 1e3:>10,.1f} kB  {path}")
        print_line(f'\ntry it: accel-train generate {run_dir} --prompt "The"')


def _require(missing: str | None, code: int, what: str, option: str) -> None:
    if missing is not None:
        raise PhaseFailed(code, f"there is no {what} to go on with ({missing}); leave out {option}")


def _example(name: str) -> Path:
    """An example that comes with the package."""
    return Path(__file__).parents[1] / "examples" / name


def _errors_of_runs() -> tuple[type[Exception], ...]:
    """What reading a run may raise; only once that was imported."""
    names = (
        ("accel_train.checkpoints.manifest", "CheckpointError"),
        ("accel_train.runs.record", "RecordError"),
        ("accel_train.tasks.text.tokenizer", "TokenizerError"),
    )
    return tuple(getattr(sys.modules[module], name) for module, name in names if module in sys.modules)


def _why_training_failed(run_dir: Path) -> str:
    """What the record of a run says, and what to do; what would only happen again is not advised."""
    manifest = importlib.import_module("accel_train.checkpoints.manifest")
    reason = str(record_of(run_dir).get("reason") or "see above")
    found = manifest.list_checkpoints(run_dir / "checkpoints")
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


def _launch_of(record: Mapping[str, Any]) -> tuple[Any, Any]:
    """Which run, and which of its launches, a record tells of."""
    return record.get("run_id"), record.get("provenance", {}).get("launches")


if __name__ == "__main__":
    sys.exit(pipeline_main())
