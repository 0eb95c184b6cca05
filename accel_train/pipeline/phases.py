"""What all phases of the pipeline share: exit codes, the error that carries one, names of options, lines for people.

Nothing beyond the standard library is imported: a missing package must become an error for people.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

_OPTION_OF = {
    "text.corpus": "--corpus-path/--corpus-url",
    "text.corpus_sha256": "--corpus-sha256",
    "text.tokenizer": "--tokenizer",
    "text.vocab_size": "--vocab-size",
    "training.max_epochs": "--epochs",
    "training.batch_size": "--batch-size",
    "training.learning_rate": "--learning-rate",
    "model.max_seq_len": "--max-seq-length",
    "seed": "--seed",
    "output_dir": "--output-dir",
}


def as_option(field: str) -> str:
    """The option that sets ``field``, for people who never saw the configuration."""
    return _OPTION_OF.get(field, field)


def say(phase: str, what: str) -> None:
    """One line of progress: the phase, then what happened."""
    print_line(f"{phase:<10} {what}")


def print_line(line: str) -> None:
    """One line on stdout, now; lost when nobody reads any more."""
    try:
        print(line, flush=True)
    except OSError:
        # The reader is gone (`| head`): that is no reason to stop.
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - for the rest of the process
