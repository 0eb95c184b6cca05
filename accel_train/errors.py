"""Every way a run can end, each with its exit code.

An exception that a user may meet is defined here and nowhere else, so the table of exit codes in the
README is this file. Nothing of the package is imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

EXIT_OK = 0
"""Finished: the gate's verdict is in the record."""
EXIT_FAILED = 1
"""Training failed; the last checkpoint is intact."""
EXIT_USAGE = 2
"""The configuration or the command line is wrong."""
EXIT_LIVE = 3
"""Answer of ``accel-train runs --status`` for a run that a live process holds."""
EXIT_PREEMPTED = 75
"""The state is saved, or the run directory is in use: run the same command again (EX_TEMPFAIL of sysexits.h)."""

EXIT_PREREQUISITES, EXIT_CORPUS, EXIT_TOKENIZER, EXIT_TRAINING, EXIT_VALIDATION = range(1, 6)
"""Of ``accel-train pipeline``: the phase that failed."""


class RunError(Exception):
    """Base of everything that ends a run in a way that people can act on."""

    exit_code: ClassVar[int] = EXIT_FAILED
    """Code that the process leaves with."""


class ConfigError(RunError, ValueError):
    """A configuration or command line that cannot be run.

    Args:
        field: dotted name of the field (or flag, or file) at fault.
        value: what it was set to.
        rule: the rule that it breaks, and what to do about it.
    """

    exit_code = EXIT_USAGE

    def __init__(self, field: str, value: object, rule: str) -> None:
        self.field, self.value, self.rule = field, value, rule
        super().__init__(f"{field}: {value!r} {rule}")


class RecordError(RunError, ValueError):
    """A record that is missing, damaged, or of another format.

    Args:
        path: the file.
        rule: what is wrong with it, and what to do about it.
    """

    exit_code = EXIT_USAGE

    def __init__(self, path: Path, rule: str) -> None:
        super().__init__(f"{path} {rule}")


class RunLocked(RunError):
    """Another process holds the run directory.

    Args:
        run_dir: the directory.
        holder: who holds it, for people.
        waited: seconds waited.
    """

    exit_code = EXIT_PREEMPTED

    def __init__(self, run_dir: Path, holder: str, waited: float) -> None:
        cure = "wait for it or stop it, then run the same command again"
        super().__init__(f"{run_dir} is in use by {holder}, still after {waited:.0f} s; {cure}")


class Interrupted(RunError):
    """Work was abandoned because ``should_stop()`` turned true.

    An exception and no return value, so that half-made results cannot be mistaken for results.
    """

    exit_code = EXIT_PREEMPTED


class Preempted(RunError):
    """Training was asked to stop; everything up to ``step`` is in a checkpoint if there is a run directory.

    Args:
        step: the last optimizer update.
        reason: what asked for it, such as the name of a signal.
    """

    exit_code = EXIT_PREEMPTED

    def __init__(self, step: int, reason: str) -> None:
        self.step = step
        super().__init__(f"stopped after step {step} ({reason})")


class LostPeer(RunError):
    """Another rank is gone or silent: nothing may be saved, the process must leave.

    Args:
        message: what was waited for, and whom, where that is known.
        ranks: the ranks that ``message`` names.
    """

    def __init__(self, message: str, *, ranks: Sequence[int] = ()) -> None:
        self.ranks = tuple(ranks)
        super().__init__(message)


class PeerFailed(RunError):
    """Another rank failed while this one waited for it, which leaves with the same code.

    Args:
        rank: the rank that failed.
        phase: what this one was waiting for.
        error: kind and message of its exception.
        exit_code: the code that it leaves with.
    """

    def __init__(self, rank: int, phase: str, error: str, exit_code: int = EXIT_FAILED) -> None:
        self.exit_code = exit_code  # type: ignore[misc] # the peer's own, not that of the class
        super().__init__(f"rank {rank} failed (waiting for '{phase}'): {error}")


class NonFinite(RunError):
    """The loss or a gradient is NaN or infinite; the weights are those before that step.

    Args:
        step: 1-based number of the update that could not be made.
        where: the first non-finite tensor.
    """

    def __init__(self, step: int, where: str) -> None:
        self.step, self.where = step, where
        what = f"training stopped at step {step}: the loss or a gradient is not finite; first: {where}"
        cure = "a lower training.learning_rate or a look at that data may help"
        super().__init__(f"{what}. Checkpoints of earlier steps are intact; {cure}")


class CheckpointError(RunError):
    """No usable checkpoint, one that may not be used here, or one that could not be written."""


class CheckpointsDamaged(CheckpointError):
    """There are checkpoints, and every one is damaged."""


class CheckpointMismatch(CheckpointError):
    """A sound checkpoint that belongs to another configuration, launch or data."""


class NewerFormat(CheckpointError):
    """A sound checkpoint of a format that a newer version writes."""


class CorpusError(RunError):
    """A corpus that breaks its own rules: a model trained on it could not pass the gate."""


class TokenizerError(RunError, ValueError):
    """A file that is no tokenizer of this project."""


class DownloadError(RunError, OSError):
    """A file could not be fetched.

    Args:
        url: its address.
        rule: what went wrong, and what to do.
    """

    def __init__(self, url: str, rule: str) -> None:
        super().__init__(f"{url} {rule}")


class PhaseFailed(RunError):
    """A phase of the pipeline cannot be completed.

    Args:
        message: what went wrong and what to do.
        exit_code: of the phase.
    """

    def __init__(self, message: str, exit_code: int = EXIT_PREREQUISITES) -> None:
        self.exit_code = exit_code  # type: ignore[misc] # that of the phase
        super().__init__(message)
