"""``accel-train pipeline``: its options, in one table; the interpreter and its packages; then the phases.

Nothing beyond the standard library is imported until the packages have been found, so that a missing one is an
error for people.
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
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from accel_train.errors import EXIT_PREEMPTED, EXIT_PREREQUISITES, PhaseFailed
from accel_train.process.console import print_line, say
from accel_train.process.signals import leaving_on_stop_signals
from accel_train.process.work import pass_by

OPTIONS_FILE = "pipeline.json"
PHASES = dict(enumerate(("Prerequisites", "Corpus", "Tokenizer", "Training", "Validation"), start=EXIT_PREREQUISITES))
"""Name of every phase, by the exit code of its failure."""
_OLDEST_PYTHON = (3, 11)
_PACKAGES = "torch accelerate safetensors numpy scipy tqdm pydantic yaml tokenizers filelock matplotlib psutil".split()
_HIGHEST_USUAL_RATE = 0.1


def main(argv: Sequence[str] | None = None, *, reached: Callable[[str], None] = pass_by) -> int:
    """Run the pipeline; returns the exit code.

    Args:
        argv: options; by default those of this process.
        reached: hears of every fault point.
    """
    began = time.perf_counter()
    try:
        with leaving_on_stop_signals(EXIT_PREEMPTED):
            options = parse_options(sys.argv[1:] if argv is None else argv)
            print_heading(EXIT_PREREQUISITES)
            check_python()
            check_output(options.output_dir)
            recall(options)
            check_options(options)
            # From here on everything is installed.
            phases = importlib.import_module("accel_train.pipeline.run")
            return int(phases.Pipeline(options, reached, began).run())
    except PhaseFailed as failure:
        print(f"accel-train pipeline: error: {failure}", file=sys.stderr)
        return failure.exit_code


def print_heading(number: int) -> None:
    """Print the heading of a phase, which is numbered by its exit code."""
    name = PHASES[number]
    print_line(f"\n== {number}/{len(PHASES)} {name} {'=' * (60 - len(name))}")


def check_python() -> None:
    """Refuse a Python that is too old or lacks a package."""
    if sys.version_info < _OLDEST_PYTHON:
        wanted, found = (".".join(map(str, v)) for v in (_OLDEST_PYTHON, sys.version_info[:3]))
        raise PhaseFailed(f"Python {found} is too old; use {wanted} or newer")
    if missing := [name for name in _PACKAGES if importlib.util.find_spec(name) is None]:
        cure = "run 'make setup', or pip install accel_train"
        raise PhaseFailed(f"{sys.executable} has no package {', '.join(missing)}; {cure}")
    say("python", f"{sys.version.split()[0]} with all packages")


def check_output(output_dir: str) -> None:
    """Make the output directory, and refuse one that cannot be written."""
    out = Path(output_dir)
    if not output_dir.strip():
        raise PhaseFailed("--output-dir: is empty; name a directory")
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / f".writable-{os.getpid()}"
        probe.write_bytes(b"x" * 4096)
        probe.unlink()
    except (OSError, ValueError) as error:
        is_full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        then = "free some space" if is_full else "choose another --output-dir"
        reason = error.strerror if isinstance(error, OSError) else error
        raise PhaseFailed(f"{out} cannot be written: {reason}; {then}") from error


# -- options -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Option:
    """One option."""

    flag: str
    help: str
    field: str | None = None
    """The field of the configuration that it sets."""
    type: type = str
    """That of its value; bool: a switch."""
    metavar: str | None = None
    choices: tuple[str, ...] | None = None
    kept: bool = True
    """Whether ``--resume`` takes it over."""

    @property
    def name(self) -> str:
        """Its attribute."""
        return self.flag.removeprefix("--").replace("-", "_")


_DEFAULT_CONFIG = "default: text_quick.yaml for the built-in corpus, text_default.yaml for any other"
_LAUNCHERS = "such as 'accelerate launch --multi_gpu --num_processes 4' (default: this process trains)"
OPTIONS = (
    Option("--corpus-path", "text file, or directory of *.txt files", "text.corpus", metavar="PATH"),
    Option("--corpus-url", "text file on the network (default: a built-in corpus)", "text.corpus", metavar="URL"),
    Option("--corpus-sha256", "digest that the corpus must have", "text.corpus_sha256", metavar="HEX"),
    Option("--tokenizer", "kind of tokenizer", "text.tokenizer", choices=("char", "bpe", "unigram")),
    Option("--vocab-size", "vocabulary of the tokenizer", "text.vocab_size", int, "N"),
    Option("--epochs", "epochs of training", "training.max_epochs", int, "N"),
    Option("--batch-size", "windows per step", "training.batch_size", int, "N"),
    Option("--learning-rate", "peak learning rate", "training.learning_rate", float, "X"),
    Option("--max-seq-length", "context length in tokens", "model.max_seq_len", int, "N"),
    Option("--seed", "seed of everything random", "seed", int, "N"),
    Option("--config", f"YAML of the text task that the options change ({_DEFAULT_CONFIG})", metavar="FILE"),
    Option("--launcher", f"what starts the processes of training, {_LAUNCHERS}", metavar="COMMAND"),
    Option("--output-dir", "where everything goes (default: results)", "output_dir", metavar="DIR", kept=False),
    Option("--skip-corpus", "neither fetch nor make a corpus: it must be there already", type=bool, kept=False),
    Option("--skip-tokenizer", "train no tokenizer: it must be there already", type=bool, kept=False),
    Option("--resume", "go on with the options of the last call in this output directory", type=bool, kept=False),
    Option("--fresh", "archive the earlier training run and train again", type=bool, kept=False),
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise PhaseFailed(f"{message}; see --help")


def parse_options(argv: Sequence[str]) -> argparse.Namespace:
    """Return the options of one call.

    Raises:
        PhaseFailed: there is no such option, or it has no such value.
    """
    parser = _Parser(
        prog="accel-train pipeline",
        description="Corpus, tokenizer, training, validation: one command. Run it again to go on, or to see that "
        "nothing is left to do.",
        epilog="exit codes: 0 success, 1 prerequisites, 2 corpus, 3 tokenizer, 4 training, 5 validation (a criterion "
        "was missed, or the model is damaged), 75 interrupted: the same command goes on",
        allow_abbrev=False,
    )
    source = parser.add_mutually_exclusive_group()
    for option in OPTIONS:
        group = source if option.field == "text.corpus" else parser
        if option.type is bool:
            group.add_argument(option.flag, action="store_true", help=option.help)
        else:
            takes: dict[str, Any] = {"type": option.type, "metavar": option.metavar, "choices": option.choices}
            group.add_argument(option.flag, help=option.help, **takes)
    parser.set_defaults(output_dir="results")
    return parser.parse_args(argv)


def as_option(field: str) -> str:
    """Return the option that sets ``field``, for people who never saw the configuration."""
    return "/".join(option.flag for option in OPTIONS if option.field == field) or field


def chosen_fields(options: argparse.Namespace) -> list[str]:
    """Return what the options set, as arguments of ``accel-train train``, the output directory last."""
    given = [(option.field, getattr(options, option.name)) for option in OPTIONS if option.field is not None]
    return [f"--{field}={value}" for field, value in given if value is not None]


def kept_options(options: argparse.Namespace) -> bytes:
    """Return what the next ``--resume`` takes over, as JSON."""
    found = {option.name: getattr(options, option.name) for option in OPTIONS if option.kept}
    given = {name: value for name, value in found.items() if value is not None}
    return json.dumps(given, indent=1).encode() + b"\n"


def recall(options: argparse.Namespace) -> None:
    """Take over the options of the last call where ``--resume`` asks for it; those given now win.

    Raises:
        PhaseFailed: there was no last call, or a path is empty.
    """
    for name in ("corpus_path", "config"):
        if (value := getattr(options, name)) == "":
            raise PhaseFailed(f"--{name.replace('_', '-')}: is empty; name a file")
        setattr(options, name, value and str(Path(value).absolute()))
    if not options.resume:
        return
    try:
        earlier: dict[str, Any] = dict(json.loads(Path(options.output_dir, OPTIONS_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        what = f"there is nothing to resume in {options.output_dir} ({OPTIONS_FILE}: {error})"
        raise PhaseFailed(f"{what}; leave out --resume") from error
    if options.corpus_path is not None or options.corpus_url is not None:
        earlier = {name: value for name, value in earlier.items() if not name.startswith("corpus_")}
    for name, value in earlier.items():
        if getattr(options, name, None) is None:
            setattr(options, name, value)


def check_options(options: argparse.Namespace) -> None:
    """Refuse what no configuration can tell: commands, addresses and options that do not go together.

    Raises:
        PhaseFailed: names the option.
    """
    if options.launcher is not None:
        try:
            command = (shlex.split(options.launcher) or [""])[0]
        except ValueError as error:
            raise PhaseFailed(f"--launcher: {options.launcher!r}: {error}; check it") from error
        if shutil.which(command) is None:
            raise PhaseFailed(f"--launcher: there is no command {command!r}; check it and PATH")
    url, vocab_size, rate = options.corpus_url, options.vocab_size, options.learning_rate
    if url is not None and not url.lower().startswith(("http://", "https://")):
        rule = "must begin with http:// or https://; --corpus-path takes files of this machine"
        raise PhaseFailed(f"--corpus-url: {url!r} {rule}")
    if options.tokenizer == "char" and vocab_size is not None:
        rule = "has no meaning for --tokenizer char, whose vocabulary is fixed; leave it out"
        raise PhaseFailed(f"--vocab-size: {vocab_size} {rule}")
    if rate is not None and rate > _HIGHEST_USUAL_RATE:
        say("warning", f"a learning rate of {rate:g} is far above the usual 1e-4 to 1e-2")


if __name__ == "__main__":
    sys.exit(main())
