"""The options of ``accel-train pipeline``, in one table: what they set, and what becomes of them.

Nothing beyond the standard library is imported: a missing package must become an error for people.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from accel_train.errors import PhaseFailed
from accel_train.process.console import say

OPTIONS_FILE = "pipeline.json"
_HIGHEST_USUAL_RATE = 0.1


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
    Option(
        "--config",
        "YAML of the text task that the options change (default: text_quick.yaml for the built-in corpus, "
        "text_default.yaml for any other)",
        metavar="FILE",
    ),
    Option(
        "--launcher",
        "what starts the processes of training, such as 'accelerate launch --multi_gpu --num_processes 4' "
        "(default: this process trains)",
        metavar="COMMAND",
    ),
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
