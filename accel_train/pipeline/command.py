"""``accel-train pipeline``: options, interpreter and packages, then the phases.

Nothing beyond the standard library is imported until the packages have been found, so that a missing one is an
error for people.
"""

from __future__ import annotations

import errno
import importlib
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from accel_train.errors import EXIT_PREEMPTED, EXIT_PREREQUISITES, PhaseFailed
from accel_train.pipeline.options import check_options, parse_options, recall
from accel_train.process.console import print_line, say
from accel_train.process.signals import leaving_on_stop_signals
from accel_train.process.work import pass_by

PHASES = dict(enumerate(("Prerequisites", "Corpus", "Tokenizer", "Training", "Validation"), start=EXIT_PREREQUISITES))
"""Name of every phase, by the exit code of its failure."""
_OLDEST_PYTHON = (3, 11)
_PACKAGES = "torch accelerate safetensors numpy scipy tqdm pydantic yaml tokenizers filelock matplotlib psutil".split()


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
            pipeline = importlib.import_module("accel_train.pipeline.run")
            code: int = pipeline.Pipeline(options, reached, began).run()
            return code
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
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
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


if __name__ == "__main__":
    sys.exit(main())
