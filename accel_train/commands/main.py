"""The command line: ``accel-train train | pipeline | runs | checkpoints | evaluate | generate``.

Names, types and help of the options of ``train`` are read from the configuration dataclasses.
Torch and everything above it are imported when a command needs them, so help, errors and
``runs`` answer in a fraction of a second. A user's mistake is one line on stderr and exit
code 2; under a launcher only rank 0 prints it.
"""

from __future__ import annotations

import argparse
import difflib
import gc
import importlib
import itertools
import json
import math
import os
import re
import sys
import time
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NoReturn

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_parsing_settings

from accel_train.config.sections import EarlierRun, ExperimentConfig
from accel_train.errors import EXIT_FAILED, EXIT_PREEMPTED, EXIT_USAGE, ConfigError, RecordError
from accel_train.pipeline.run import pipeline_main
from accel_train.process.fault_points import SILENT, Observer
from accel_train.process.signals import ask_for_sigterm_when_launcher_dies, leaving_on_stop_signals
from accel_train.runs.record import STATUS_CODES, RunSummary, list_runs, run_status, strict_json

_TEXT_OPTIONS = ("prompt", "max_tokens", "temperature", "top_k", "top_p", "seed")
LAST_WORDS_SECONDS = 10.0

# Process-wide, and the only switch there is: help texts come from the docstrings under the fields.
set_parsing_settings(docstring_parse_attribute_docstrings=True)


def main(argv: Sequence[str] | None = None) -> int:
    """The console script ``accel-train``; returns the process's exit code (see DESIGN.md)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["train"]:
        return train_main(arguments[1:], command=["accel-train", *arguments])
    if arguments[:1] == ["pipeline"]:
        return pipeline_main(arguments[1:])
    return _guarded(lambda: _dispatch(_commands().parse_args(arguments)))


def train_main(
    argv: Sequence[str] | None = None, *, command: Sequence[str] | None = None, observer: Observer = SILENT
) -> int:
    """``accel-train train``, which ``scripts/train.py`` calls as well.

    Args:
        argv: options; by default those of this process.
        command: the whole command line, for the record.
        observer: hears of every point at which a fault may fall.
    """
    options = list(sys.argv[1:] if argv is None else argv)

    def run() -> int:
        config, earlier = parse_config(options)
        experiment = _import_experiment()
        whole = list(command or [sys.argv[0], *options])
        code: int = experiment.run(config, earlier=earlier, command=whole, observer=observer)
        return code

    with leaving_on_stop_signals(EXIT_PREEMPTED):
        # Before the seconds of importing torch: a launcher that dies in them takes this process along.
        if ask_for_sigterm_when_launcher_dies():
            return EXIT_PREEMPTED
        return _guarded(run)


def _import_experiment() -> types.ModuleType:
    """Import what trains; without the collector, which would walk over torch's new objects again and again."""
    name = "accel_train.runs.experiment"
    if name in sys.modules or not gc.isenabled():
        return importlib.import_module(name)
    gc.disable()
    try:
        module = importlib.import_module(name)
        # They stay to the end: neither collections in training nor forked data workers shall touch them.
        gc.freeze()
    finally:
        gc.enable()
    return module


def _guarded(action: Callable[[], int]) -> int:
    try:
        return action()
    except (ConfigError, RecordError) as error:
        return _complain(str(error), EXIT_USAGE)
    except BrokenPipeError:
        # The reader of our output is gone; Python would complain about it once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED


def _complain(message: str, code: int) -> int:
    # Every process of a launch finds the same mistake; the line must stand there once.
    if os.environ.get("RANK", "0") == "0":
        sys.stderr.write(f"accel-train: error: {' '.join(message.split())}\n")
    else:
        # The launcher ends all ranks once the first one leaves: rank 0 must have spoken by then.
        time.sleep(LAST_WORDS_SECONDS)
    return code


# -- train ---------------------------------------------------------------------------------


def parse_config(argv: Sequence[str]) -> tuple[ExperimentConfig, EarlierRun]:
    """What the options of ``train`` ask for: the configuration, and what becomes of an earlier run.

    Raises:
        ConfigError: names the field (and the file, where the value stands in one), the value and the rule.
        SystemExit: ``--help`` or ``--print_config`` was answered.
    """
    files = _read_config_files(argv)
    parser = _train_parser()
    try:
        parsed = parser.parse_args(list(argv))
        for name, kind in _field_types().items():
            if is_dataclass(kind) and not isinstance(parsed[name], Namespace):
                raise ConfigError(name, parsed[name], f"must be {_expected(kind)}")
        values = parser.instantiate(parsed).as_dict()
        earlier = EarlierRun(**{name: values.pop(name) for name in ("fresh", "on_damage") if name in values})
        values.pop("config", None)
        return ExperimentConfig(**values), earlier
    except ArgumentError as error:
        raise _located(_translate(str(error)), argv, files) from None
    except ConfigError as error:
        raise _located(error, argv, files) from None


def _train_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="accel-train train",
        usage="accel-train train [--config FILE] [--SECTION.FIELD VALUE ...] [--fresh] [--on_damage restart] "
        "[--print_config]",
        description="Train, or resume: the same command run again continues. Options win over the file.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the fields below")
    parser.add_argument(
        "--fresh",
        action="store_true",
        default=argparse.SUPPRESS,
        help="archive an earlier run of this name and start over",
    )
    parser.add_argument(
        "--on_damage",
        choices=["refuse", "restart"],
        default=argparse.SUPPRESS,
        help="when every checkpoint is damaged: refuse to go on (the default), or set them aside and start over",
    )
    parser.add_class_arguments(ExperimentConfig)
    return parser


def _read_config_files(argv: Sequence[str]) -> dict[str, dict[str, Any]]:
    """File name -> dotted field -> value for every ``--config``; refuses what is no configuration.

    jsonargparse would read them too, but its complaints know neither file nor line.
    """
    names = [argument.removeprefix("--config=") for argument in argv if argument.startswith("--config=")]
    names += [value for option, value in itertools.pairwise(argv) if option == "--config"]
    return {name: dict(_checked_fields(name, _load_yaml(name))) for name in names}


def _load_yaml(name: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(Path(name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError("--config", name, "does not exist; check the path") from None
    except OSError as error:
        raise ConfigError("--config", name, f"cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError("--config", name, f"is not UTF-8 text (byte {error.start}); check the path") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error)
        raise ConfigError("--config", name, f"is not valid YAML: {line}{problem}") from None
    if not isinstance(values, dict):
        raise ConfigError("--config", name, "holds no fields; write lines such as 'seed: 1'")
    return values


def _checked_fields(file: str, values: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    kinds = _field_types()
    for key, value in values.items():
        name = f"{prefix}{key}"
        if name not in kinds:
            raise _unknown(name, value, f" (in {file})")
        if not is_dataclass(kinds[name]):
            yield name, value
        elif isinstance(value, Mapping):
            yield from _checked_fields(file, value, f"{name}.")
        else:
            raise ConfigError(name, value, f"must be {_expected(kinds[name])} (in {file})")


def _unknown(name: str, value: object, where: str = "") -> ConfigError:
    kinds = _field_types()
    section, _, leaf = name.rpartition(".")
    if is_dataclass(kinds.get(section)):
        leaves = [known.rpartition(".")[2] for known in kinds if known.startswith(f"{section}.")]
        near = [f"{section}.{match}" for match in difflib.get_close_matches(leaf, leaves, n=1)]
    else:
        near = difflib.get_close_matches(name, kinds, n=1, cutoff=0.7)
    cure = f"did you mean {near[0]}?" if near else "accel-train train --help lists them"
    return ConfigError(name, value, f"is not a field of the configuration; {cure}{where}")


def _translate(message: str) -> ConfigError:
    """One of jsonargparse's complaints, which may fill many lines, in our form."""
    if found := re.match(r"unrecognized arguments: (\S+)\s*(.*)", message, re.DOTALL):
        option, rest = found.groups()
        if not option.startswith("--"):
            return ConfigError("command line", option, "is not an option; write --section.field VALUE")
        name, _, value = option[2:].partition("=")
        return _unknown(name, value or rest)
    if found := re.match(r"Group '(\S+)' does not accept option '(\S+)'", message):
        return _unknown(".".join(found.groups()), None)
    if found := re.match(r"argument (--\S+): (.*)", message, re.DOTALL):
        return ConfigError("command line", found[1], f"needs a value ({found[2]})")
    if (found := re.match(r'Parser key "([^"]+)":', message)) and found[1] in _field_types():
        given = re.search(r".*(?:Got value|Given value): (.*)", message, re.DOTALL)
        value = None if given is None else given[1]
        return ConfigError(found[1], value, f"must be {_expected(_field_types()[found[1]])}")
    return ConfigError("command line", message, "cannot be read; see accel-train train --help")


def _located(error: ConfigError, argv: Sequence[str], files: Mapping[str, Mapping[str, Any]]) -> ConfigError:
    """The error with the value as the user wrote it, and with the file that it stands in."""
    name = error.field
    typed = dict(argument[2:].split("=", 1) for argument in argv if "=" in argument)
    typed |= {option[2:]: value for option, value in itertools.pairwise(argv) if "=" not in option}
    as_written = isinstance(error.value, str | None)  # jsonargparse hands its own spelling on
    for file, values in files.items():
        if name in values and (name not in typed or str(values[name]) == str(error.value)):
            return ConfigError(name, values[name] if as_written else error.value, f"{error.rule} (in {file})")
    section = name.partition(".")[0]
    return ConfigError(
        name, typed.get(name, error.value or typed.get(section)) if as_written else error.value, error.rule
    )


def _field_types(cls: type = ExperimentConfig, prefix: str = "") -> dict[str, Any]:
    """Dotted name -> type of every section and field."""
    found: dict[str, Any] = {}
    for name, kind in typing.get_type_hints(cls).items():
        found[f"{prefix}{name}"] = kind
        if is_dataclass(kind):
            found |= _field_types(typing.cast(type, kind), f"{prefix}{name}.")
    return found


_PLAIN_TYPES = {
    int: "an integer",
    float: "a number",
    str: "a text",
    bool: "true or false",
    type(None): "null",
}


def _expected(kind: Any) -> str:
    """A type in words, such as "a list of integers or null"."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if is_dataclass(kind):
        return "a section with fields of its own"
    if origin is Literal:
        return f"one of {', '.join(map(repr, parts))}"
    if origin in {typing.Union, types.UnionType}:
        null_first = sorted(parts, key=lambda part: part is not type(None))
        return " or ".join(_expected(part) for part in null_first)
    if origin is tuple:
        if parts[-1] is Ellipsis:
            return f"a list such as [a, b], each {_expected(parts[0])}"
        return f"a list of {len(parts)}, each {_expected(parts[0])}"
    return _PLAIN_TYPES.get(kind, str(kind))


# -- the other commands --------------------------------------------------------------------


class _CommandParser(argparse.ArgumentParser):
    """Says what is wrong in one line, without repeating the usage."""

    def error(self, message: str) -> NoReturn:
        """Called by argparse for every mistake."""
        self.exit(_complain(f"{message}; see {self.prog} --help", EXIT_USAGE))


def _commands() -> argparse.ArgumentParser:
    parser = _CommandParser(
        prog="accel-train",
        description="Train small transformer language models that can be killed at any instant.",
        epilog="exit codes: 0 finished, 1 failed, 2 wrong configuration or command line, "
        "75 preempted or locked: run the same command again",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("train", help="train or resume an experiment", add_help=False)

    commands.add_parser("pipeline", help="from a corpus to a validated model", add_help=False)

    runs = commands.add_parser("runs", help="list runs, or print the status of one")
    runs.add_argument("results", nargs="?", default=ExperimentConfig.output_dir, type=Path, help="results directory")
    runs.add_argument("--passed", action="store_true", help="only runs that are completed and passed their gate")
    runs.add_argument(
        "--status",
        metavar="ID",
        help="print how this run stands; exit code 0 completed, 1 failed, 3 live, 75 preempted or interrupted",
    )
    runs.add_argument("--json", action="store_true", help="print JSON")

    checkpoints = commands.add_parser("checkpoints", help="list the checkpoints of a run and whether they are sound")
    checkpoints.add_argument("run", type=Path, help="run directory")
    checkpoints.add_argument("--verify", action="store_true", help="read every byte and compare digests")
    checkpoints.add_argument("--json", action="store_true", help="print JSON")

    evaluate = commands.add_parser("evaluate", help="judge the newest checkpoint of a run by its gate; prints JSON")
    evaluate.add_argument("run", type=Path, help="run directory")

    generate = commands.add_parser("generate", help="print what the newest checkpoint of a run writes")
    generate.add_argument("run", type=Path, help="run directory")
    generate.add_argument("--num", type=_positive, help="number of sequences (default: walks 5, text 1)")
    text = generate.add_argument_group("runs of the text task")
    text.add_argument("--prompt", help="text to continue (default: the run's text.prompt)")
    text.add_argument("--max-tokens", type=_positive, help="tokens to write (default: 200)")
    text.add_argument("--temperature", type=_number(0), help="0 takes the most likely token (default: the run's)")
    text.add_argument("--top-k", type=_positive, help="sample from the so many most likely tokens")
    text.add_argument("--top-p", type=_number(0, 1, above=True), help="sample from the fewest tokens this likely")
    text.add_argument("--seed", type=int, help="seed of the samples (default: 0)")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def _number(least: float, most: float | None = None, *, above: bool = False) -> Callable[[str], float]:
    """A type of argparse: numbers from ``least`` (or ``above`` it) to ``most``."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not least <= value <= (math.inf if most is None else most) or (above and value == least):
            wanted = f"at least {least:g}" if most is None else f"{'above' if above else 'from'} {least:g} to {most:g}"
            raise argparse.ArgumentTypeError(f"{text!r} is not a number {wanted}")
        return value

    return read


def _dispatch(arguments: argparse.Namespace) -> int:
    if arguments.command == "runs":
        return _runs(arguments)
    if arguments.command == "checkpoints":
        return _checkpoints(arguments)
    inference = importlib.import_module("accel_train.runs.use")
    try:
        if arguments.command == "evaluate":
            print(strict_json(inference.evaluate(arguments.run)))
        else:
            _generate(arguments, inference)
    except BrokenPipeError:
        raise
    except (inference.CheckpointError, inference.CorpusError, inference.TokenizerError, OSError) as error:
        return _complain(str(error), EXIT_FAILED)
    return 0


def _generate(arguments: argparse.Namespace, inference: types.ModuleType) -> None:
    options = {name: value for name in _TEXT_OPTIONS if (value := getattr(arguments, name)) is not None}
    if inference.task_of(arguments.run) == "text":
        chosen = options if arguments.num is None else {"num": arguments.num, **options}
        pieces = inference.generate_text(arguments.run, inference.TextOptions(**chosen))
    else:
        for name, value in options.items():
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(option, value, "is for runs of the text task; this one walks")
        pieces = inference.generate_walks(arguments.run, arguments.num or 5)
    for piece in pieces:
        print(piece, end="", flush=True)


def _runs(arguments: argparse.Namespace) -> int:
    if arguments.status is not None:
        status = run_status(arguments.results / arguments.status)
        print(json.dumps({"id": arguments.status, "status": status}) if arguments.json else status)
        return STATUS_CODES[status]
    runs = list_runs(arguments.results)
    if arguments.passed:
        runs = [run for run in runs if run.status == "completed" and run.gate_passed]
    if arguments.json:
        print(json.dumps([asdict(run) for run in runs], indent=1))
    else:
        print("\n".join(_table(runs)))
    return 0


def _checkpoints(arguments: argparse.Namespace) -> int:
    """Exit code 0 when every committed checkpoint is sound as far as was looked, else 1."""
    if not arguments.run.is_dir():
        raise ConfigError("RUN", str(arguments.run), "is not a directory; name the directory of a run")
    manifest = importlib.import_module("accel_train.checkpoints.manifest")
    found = manifest.survey(arguments.run / "checkpoints", full=arguments.verify)
    if arguments.json:
        print(json.dumps([asdict(checkpoint) for checkpoint in found], indent=1))
    elif not found:
        print(f"{arguments.run} has no checkpoint yet")
    else:
        sound = "sound" if arguments.verify else "sizes agree"
        rows = [("CHECKPOINT", "STEP", "EPOCH", "PROCESSES", "SIZE", "AGE", "STATE")]
        for each in found:
            state = "set aside as damaged" if each.set_aside else "; ".join(each.problems) or sound
            cells = ["-" if value is None else f"{value}" for value in (each.step, each.epoch, each.world_size)]
            rows.append((each.name, *cells, f"{each.size / 1e6:.1f} MB", _age(each.written_at), state))
        print("\n".join(_aligned(rows)))
    return EXIT_FAILED if any(each.problems and not each.set_aside for each in found) else 0


def _table(runs: Sequence[RunSummary]) -> list[str]:
    rows = [("ID", "STATUS", "EPOCHS", "GATE", "EDGE", "RULE", "LOSS", "BPB", "AGE")]
    rows += [
        (
            run.id,
            run.status,
            f"{run.epochs:.4g}",
            "passed" if run.gate_passed else "-",
            _figure(run.edge_compliance),
            _figure(run.rule_compliance),
            _figure(run.val_loss),
            _figure(run.val_bits_per_byte),
            _age(run.created_at),
        )
        for run in runs
    ]
    return _aligned(rows)


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Cells padded to the width of their column."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _age(created_at: str | None) -> str:
    """Such as ``5m``, ``3h``, ``12d``."""
    if created_at is None:
        return "-"
    seconds = max(0.0, (datetime.now(UTC) - datetime.fromisoformat(created_at)).total_seconds())
    for unit, length in (("d", 86_400), ("h", 3_600), ("m", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f}{unit}"
    return f"{seconds:.0f}s"


if __name__ == "__main__":
    sys.exit(main())
