"""The command line: ``accel-train train | pipeline | runs | checkpoints | evaluate | generate``.

Each command is a module that is imported when it is called, so help, errors and ``runs`` answer in a fraction
of a second, and a missing package is told by the command that looks for it. A user's mistake is one line on
stderr and exit code 2; under a launcher only rank 0 prints it.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from accel_train.errors import EXIT_FAILED, EXIT_USAGE, RunError
from accel_train.process.work import pass_by

LAST_WORDS_SECONDS = 10.0
_MODULES = {"runs": "runs", "checkpoints": "runs", "evaluate": "use", "generate": "use"}
"""Module of this folder whose function of the same name is the command."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the console script ``accel-train``; returns the process's exit code (see :mod:`accel_train.errors`)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["train"]:
        return train_main(arguments[1:], command=["accel-train", *arguments])
    if arguments[:1] == ["pipeline"]:
        return int(importlib.import_module("accel_train.pipeline.command").main(arguments[1:]))
    return guarded(lambda: _run_command(_parser().parse_args(arguments)))


def train_main(
    argv: Sequence[str] | None = None, *, command: Sequence[str] | None = None, reached: Callable[[str], None] = pass_by
) -> int:
    """Run ``accel-train train``, which ``scripts/train.py`` calls as well.

    Args:
        argv: options; by default those of this process.
        command: the whole command line, for the record.
        reached: hears of every fault point.
    """
    options = list(sys.argv[1:] if argv is None else argv)
    train = importlib.import_module("accel_train.commands.train")
    return guarded(lambda: train.main(options, command=list(command or [sys.argv[0], *options]), reached=reached))


def guarded(action: Callable[[], int]) -> int:
    """Return the exit code of a command; an error that people can act on becomes one line."""
    try:
        return action()
    except RunError as error:
        return complain(str(error), error.exit_code)
    except BrokenPipeError:
        # The reader of our output is gone; Python would complain about it once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except OSError as error:
        return complain(str(error), EXIT_FAILED)


def complain(message: str, code: int) -> int:
    """Print one line on stderr, once for all processes of a launch; returns ``code``."""
    if os.environ.get("RANK", "0") == "0":
        sys.stderr.write(f"accel-train: error: {' '.join(message.split())}\n")
    else:
        # The launcher ends all ranks once the first one leaves: rank 0 must have spoken by then.
        time.sleep(LAST_WORDS_SECONDS)
    return code


class _CommandParser(argparse.ArgumentParser):
    """Says what is wrong in one line, without repeating the usage."""

    def error(self, message: str) -> NoReturn:
        """Called by argparse for every mistake."""
        self.exit(complain(f"{message}; see {self.prog} --help", EXIT_USAGE))


def _run_command(arguments: argparse.Namespace) -> int:
    module = importlib.import_module(f"accel_train.commands.{_MODULES[arguments.command]}")
    return int(getattr(module, arguments.command)(arguments))


def _parser() -> argparse.ArgumentParser:
    about = "Train small transformer language models that can be killed at any instant."
    codes = "exit codes: 0 finished, 1 failed, 2 wrong configuration or command line, 75 preempted or locked"
    parser = _CommandParser(prog="accel-train", description=about, epilog=f"{codes}: run the same command again")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("train", help="train or resume an experiment", add_help=False)
    commands.add_parser("pipeline", help="from a corpus to a validated model", add_help=False)

    runs = commands.add_parser("runs", help="list runs, or print the status of one")
    runs.add_argument("results", nargs="?", type=Path, help="results directory (default: results)")
    runs.add_argument("--passed", action="store_true", help="only runs that are completed and passed their gate")
    status = "print how this run stands; exit code 0 completed, 1 failed, 3 live, 75 preempted or interrupted"
    runs.add_argument("--status", metavar="ID", help=status)
    runs.add_argument("--json", action="store_true", help="print JSON")

    checkpoints = commands.add_parser("checkpoints", help="list the checkpoints of a run and whether they are sound")
    checkpoints.add_argument("--verify", action="store_true", help="read every byte and compare digests")
    checkpoints.add_argument("--json", action="store_true", help="print JSON")

    evaluate = commands.add_parser("evaluate", help="judge the newest checkpoint of a run by its gate; prints JSON")
    generate = commands.add_parser("generate", help="print what the newest checkpoint of a run writes")
    for command in (checkpoints, evaluate, generate):
        command.add_argument("run", type=Path, help="run directory")

    positive = _number(int, "positive whole number", lambda number: number >= 1)
    from_zero = _number(float, "number at least 0", lambda number: number >= 0)
    probability = _number(float, "number above 0 to 1", lambda number: 0 < number <= 1)
    generate.add_argument("--num", type=positive, help="number of sequences (default: walks 5, text 1)")
    text = generate.add_argument_group("runs that continue a text")
    text.add_argument("--prompt", help="text to continue (default: the run's)")
    text.add_argument("--max-tokens", type=positive, help="tokens to write (default: 200)")
    text.add_argument("--temperature", type=from_zero, help="0 takes the most likely token (default: the run's)")
    text.add_argument("--top-k", type=positive, help="sample from the TOP_K most likely tokens")
    text.add_argument("--top-p", type=probability, help="sample from the fewest tokens this likely")
    text.add_argument("--seed", type=int, help="seed of the samples (default: 0)")
    return parser


def _number(kind: Callable[[str], float], wanted: str, holds: Callable[[float], bool]) -> Callable[[str], float]:
    """A type of argparse: what ``kind`` makes of a text, where ``holds`` is true of that."""

    def read(text: str) -> float:
        with suppress(ValueError):
            if holds(number := kind(text)):
                return number
        raise argparse.ArgumentTypeError(f"{text!r} is not a {wanted}")

    return read


if __name__ == "__main__":
    sys.exit(main())
