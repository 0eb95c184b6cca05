"""What the pipeline looks at before it begins: the configuration, and whether disk and memory will do."""

from __future__ import annotations

import argparse
import shutil
from contextlib import suppress
from pathlib import Path

from accel_train.config.parse import parse_config
from accel_train.config.sections import SHARED_CORPORA, ExperimentConfig
from accel_train.errors import ConfigError, PhaseFailed, RecordError
from accel_train.model import size
from accel_train.pipeline.command import as_option, chosen_fields
from accel_train.process.console import say
from accel_train.runs.directory import run_directory
from accel_train.runs.initial_weights import resolve_weights
from accel_train.runs.record import RunRecord, read_record
from accel_train.tasks.registry import config_class
from accel_train.tasks.text.config import TextConfig

_SPARE_BYTES = 50_000_000
_EXAMPLES = Path(__file__).parents[1] / "examples"


def read_configuration(options: argparse.Namespace) -> ExperimentConfig:
    """Return the example that fits, changed by the options.

    Raises:
        PhaseFailed: a value is out of range, or the file is no configuration of the text task.
    """
    has_corpus = options.corpus_path or options.corpus_url
    file = Path(options.config or _EXAMPLES / ("text_default.yaml" if has_corpus else "text_quick.yaml"))
    arguments = chosen_fields(options)
    try:
        if parse_config(["--config", str(file)], config_class)[0].task != "text":
            rule = "describes another task than text; the examples text_*.yaml and char.yaml are a start"
            raise PhaseFailed(f"--config: {file} {rule}")
        parsed = parse_config(["--config", str(file), *arguments], config_class)[0]
    except ConfigError as error:
        raise PhaseFailed(f"{as_option(error.field)}: {error.value!r} {error.rule}") from error
    shown = arguments[:-1]
    say("settings", f"{file}{', with ' + ' '.join(shown) if shown else ''}")
    return parsed


def check_space(config: ExperimentConfig, out: Path) -> None:
    """Refuse a disk that is too small for what is still to be written, and warn where the memory will hardly do.

    Raises:
        PhaseFailed: says what is free and what is needed.
    """
    text: TextConfig = config.section
    # Weights and two moments in each checkpoint; the kept ones, the best, and one being written.
    checkpoints = 12 * size.transformer_parameters(config.model, text.vocab_size) * (config.checkpoint.keep_last + 2)
    needed = checkpoints + 2 * _bytes_of_corpus(text) + _SPARE_BYTES
    # What an earlier call has written of it is no reason to send anybody elsewhere.
    run_dir = run_dir_of(config)
    there = _bytes_in(run_dir) + _bytes_in(out / SHARED_CORPORA)
    free = shutil.disk_usage(out).free
    told = f"{free / 1e6:,.0f} MB free in {out}, about {max(0, needed - there) / 1e6:,.0f} MB needed"
    record = record_of(run_dir)
    if free + there < needed and (record is None or record.status != "completed"):
        raise PhaseFailed(f"{told}; free some, or choose another --output-dir")
    say("disk", told)
    for warning in size.warnings(config.model, config.training, text.vocab_size):
        say("warning", warning)


def _bytes_in(directory: Path) -> int:
    found = 0
    for path in directory.rglob("*"):
        with suppress(OSError):  # another run may remove it meanwhile
            found += path.stat().st_size if path.is_file() else 0
    return found


def _bytes_of_corpus(text: TextConfig) -> int:
    """About the bytes of the corpus, as far as they can be known before it is fetched."""
    corpus = Path(text.corpus)
    try:
        files = [*corpus.glob("*.txt")] if corpus.is_dir() else [corpus]
        return sum(file.stat().st_size for file in files)
    except OSError:
        return text.corpus_bytes or text.builtin_bytes


def run_dir_of(config: ExperimentConfig) -> Path:
    """Return where the run lives; the weights that it starts from are part of its name."""
    digest = resolve_weights(config)[1] if config.start.weights is not None else None
    return run_directory(config, digest)


def record_of(run_dir: Path) -> RunRecord | None:
    """Return the record of a run; None where there is none that can be read."""
    try:
        return read_record(run_dir)
    except RecordError:
        return None
