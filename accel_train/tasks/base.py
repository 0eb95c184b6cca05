"""What an experiment needs from a task: its data, its criteria, and a way to judge a model.

A task knows nothing of ranks, signals or files of the run: the experiment calls ``check``,
``build`` and ``preflight`` on the main process only, ``open`` on every rank, and hands
``should_stop`` to everything that may take long.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from accel_train.tasks.criteria import Verdict

StopCheck = Callable[[], bool]
Say = Callable[[str, str], None]
"""``say(phase, what)``: one line of progress for people."""


class Task(Protocol):
    """One thing to learn."""

    @property
    def vocab_size(self) -> int:
        """Size of the model's vocabulary."""

    def check(self) -> None:
        """Refuse, writing nothing, what cannot work; raises ``ConfigError``."""

    def build(self, shared: Path, say: Say, should_stop: StopCheck) -> str:
        """Build or reuse the shared artifacts under ``shared``; returns their directory."""

    def open(self, artifacts: str) -> Any:
        """The training dataset over the artifacts that ``build`` returned, without copying them."""

    def preflight(self, say: Say) -> dict[str, Any]:
        """What the gate can reach, as JSON values with ``reachable`` and ``warnings``."""

    def evaluate(self, model: nn.Module, should_stop: StopCheck) -> Verdict:
        """Judge ``model``; raises ``Interrupted`` when ``should_stop()`` turns true."""
