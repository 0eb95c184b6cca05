"""What the pipeline looks at before it begins: interpreter, packages, options, places, space.

Nothing beyond the standard library is imported until the packages have been found.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import importlib.util
import json
import os
import shlex
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accel_train.errors import EXIT_PREREQUISITES, PhaseFailed
from accel_train.pipeline.phases import say

if TYPE_CHECKING:
    from accel_train.config.sections import ExperimentConfig, TextConfig

OPTIONS_FILE = "pipeline.json"

_OLDEST_PYTHON = (3, 11)
_PACKAGES = (
    "torch accelerate safetensors numpy scipy tqdm jsonargparse yaml tokenizers filelock matplotlib psutil".split()
)
_HIGHEST_USUAL_RATE = 0.1
_SPARE_BYTES = 50_000_000


def check_python() -> None:
    """Refuse a Python that is too old or lacks a package."""
    if sys.version_info < _OLDEST_PYTHON:
        wanted, found = (".".join(map(str, v)) for v in (_OLDEST_PYTHON, sys.version_info[:3]))
        raise PhaseFailed(EXIT_PREREQUISITES, f"Python {found} is too old; use {wanted} or newer")
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise PhaseFailed(
            EXIT_PREREQUISITES,
            f"{sys.executable} has no package {', '.join(missing)}; run 'make setup', or pip install accel_train",
        )
    say("python", f"{sys.version.split()[0]} with all packages")


def check_output(options: argparse.Namespace) -> None:
    """Make the output directory, and refuse one that cannot be written."""
    out = Path(options.output_dir)
    if not options.output_dir.strip():
        raise PhaseFailed(EXIT_PREREQUISITES, "--output-dir: is empty; name a directory")
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / f".writable-{os.getpid()}"
        probe.write_bytes(b"x" * 4096)
        probe.unlink()
    except (OSError, ValueError) as error:
        is_full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        then = "free some space" if is_full else "choose another --output-dir"
        reason = error.strerror if isinstance(error, OSError) else error
        raise PhaseFailed(EXIT_PREREQUISITES, f"{out} cannot be written: {reason}; {then}") from error


def recall(options: argparse.Namespace) -> None:
    """Take over the options of the last call where ``--resume`` asks for it; those given now win."""
    out = Path(options.output_dir)
    path = out / OPTIONS_FILE
    for name in ("corpus_path", "config"):
        if (value := getattr(options, name)) is None:
            continue
        if not value:
            raise PhaseFailed(EXIT_PREREQUISITES, f"--{name.replace('_', '-')}: is empty; name a file")
        setattr(options, name, str(Path(value).absolute()))
    if not options.resume:
        return
    try:
        earlier = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise PhaseFailed(
            EXIT_PREREQUISITES,
            f"there is nothing to resume in {out} ({path.name}: {error}); leave out --resume",
        ) from error
    if options.corpus_path is not None or options.corpus_url is not None:
        earlier = {name: value for name, value in earlier.items() if not name.startswith("corpus_")}
    for name, value in earlier.items():
        if getattr(options, name, None) is None:
            setattr(options, name, value)


def check_options(options: argparse.Namespace) -> None:
    """What no configuration can tell: commands, addresses and options that do not go together."""
    if options.launcher is not None:
        try:
            command = (shlex.split(options.launcher) or [""])[0]
        except ValueError as error:
            raise PhaseFailed(EXIT_PREREQUISITES, f"--launcher: {options.launcher!r}: {error}; check it") from error
        if shutil.which(command) is None:
            raise PhaseFailed(EXIT_PREREQUISITES, f"--launcher: there is no command {command!r}; check it and PATH")
    download = importlib.import_module("accel_train.tasks.text.download")
    if options.corpus_url is not None and not download.is_url(options.corpus_url):
        rule = "must begin with http:// or https://; --corpus-path takes files of this machine"
        raise PhaseFailed(EXIT_PREREQUISITES, f"--corpus-url: {options.corpus_url!r} {rule}")
    if options.tokenizer == "char" and options.vocab_size is not None:
        rule = "has no meaning for --tokenizer char, whose vocabulary is fixed; leave it out"
        raise PhaseFailed(EXIT_PREREQUISITES, f"--vocab-size: {options.vocab_size} {rule}")
    if options.learning_rate is not None and options.learning_rate > _HIGHEST_USUAL_RATE:
        say("warning", f"a learning rate of {options.learning_rate:g} is far above the usual 1e-4 to 1e-2")


def check_space(config: ExperimentConfig, out: Path) -> None:
    """Refuse a disk that is too small for what is still to be written, and warn where the memory will hardly do."""
    memory = importlib.import_module("accel_train.model.size")
    shared = importlib.import_module("accel_train.config.sections").SHARED_CORPORA
    vocabulary = config.text.vocab_size
    # Weights and two moments in each checkpoint; the kept ones, the best, and one being written.
    checkpoints = 12 * memory.parameters(config.model, vocabulary) * (config.checkpoint.keep_last + 2)
    needed = checkpoints + 2 * _size_of(config.text) + _SPARE_BYTES
    # What an earlier call has written of it is no reason to send anybody elsewhere.
    run_dir = run_dir_of(config)
    there = _bytes_in(run_dir) + _bytes_in(out / shared)
    free = shutil.disk_usage(out).free
    told = f"{free / 1e6:,.0f} MB free in {out}, about {max(0, needed - there) / 1e6:,.0f} MB needed"
    if free + there < needed and record_of(run_dir).get("status") != "completed":
        raise PhaseFailed(EXIT_PREREQUISITES, f"{told}; free some, or choose another --output-dir")
    say("disk", told)
    for warning in memory.warnings(config, vocabulary):
        say("warning", warning)


def _bytes_in(directory: Path) -> int:
    found = 0
    for path in directory.rglob("*"):
        with suppress(OSError):  # another run may remove it meanwhile
            found += path.stat().st_size if path.is_file() else 0
    return found


def _size_of(text: TextConfig) -> int:
    """About the bytes of the corpus, as far as they can be known before it is fetched."""
    corpus = Path(text.corpus)
    try:
        files = [*corpus.glob("*.txt")] if corpus.is_dir() else [corpus]
        return sum(file.stat().st_size for file in files)
    except OSError:
        return text.corpus_bytes or text.builtin_bytes


def run_dir_of(config: ExperimentConfig) -> Path:
    """Where the run lives; the weights that it starts from are part of its name."""
    settings = importlib.import_module("accel_train.config.sections")
    digest = None
    if config.training.init_from is not None:
        _, digest = importlib.import_module("accel_train.runs.initial_weights").resolve_init(config)
    path: Path = settings.run_directory(config, digest)
    return path


def record_of(run_dir: Path) -> dict[str, Any]:
    """The record of a run; empty where there is none."""
    record = importlib.import_module("accel_train.runs.record")
    try:
        found: dict[str, Any] = record.read_record(run_dir)
    except record.RecordError:
        return {}
    return found
