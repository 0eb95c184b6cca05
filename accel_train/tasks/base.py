"""What an experiment needs from a task: its data, its criteria, and a way to judge a model.

A task knows nothing of ranks, signals or files of the run: the experiment calls ``check``,
``build`` and ``preflight`` on the main process only, ``open`` on every rank, and hands
``should_stop`` to everything that may take long.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from accel_train.tasks.criteria import Verdict

StopCheck = Callable[[], bool]
Say = Callable[[str, str], None]
"""``say(phase, what)``: one line of progress for people."""


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found."""

    verdict: Verdict | None
    """None: it measured without judging."""
    metrics: dict[str, float | None] = field(default_factory=dict)
    """Its figures, when there is no verdict to hold them."""
    samples: list[str] = field(default_factory=list)
    """What the model wrote, for people."""

    def to_dict(self) -> dict[str, Any]:
        """JSON values, with ``metrics`` in any case."""
        judged = {} if self.verdict is None else self.verdict.to_dict()
        metrics = {"metrics": self.metrics} if self.verdict is None else {}
        return {**judged, **metrics, **({"samples": self.samples} if self.samples else {})}


@dataclass(frozen=True)
class Trained:
    """What training has left, for the last judgement."""

    model: nn.Module
    """The final weights, unwrapped."""
    checkpoint: Path
    """The same weights on disk."""
    evaluation: dict[str, Any]
    """The last evaluation."""
    epoch_losses: list[float]
    """Mean training loss of every whole epoch."""


class Task(Protocol):
    """One thing to learn."""

    @property
    def vocab_size(self) -> int:
        """Size of the model's vocabulary."""

    def check(self, say: Say, should_stop: StopCheck) -> None:
        """Refuse, writing nothing, what cannot work; raises ``ConfigError``."""

    def build(self, shared: Path, say: Say, should_stop: StopCheck) -> str:
        """Build or reuse the shared artifacts under ``shared``; returns their directory."""

    def open(self, artifacts: str) -> Any:
        """The training dataset over the artifacts that ``build`` returned, without copying them."""

    def validation(self) -> dict[str, Any]:
        """Datasets, by name, whose loss every evaluation measures; after ``open``."""

    def digests(self) -> dict[str, str]:
        """What the data is made of: a run does not go on with other data than it began with; after ``open``."""

    def files(self) -> dict[str, bytes]:
        """Small files that belong into every checkpoint; after ``open``."""

    def preflight(self, say: Say) -> dict[str, Any]:
        """What the gate can reach, as JSON values with ``reachable`` and ``warnings``."""

    def evaluate(self, model: nn.Module, losses: Mapping[str, float], should_stop: StopCheck) -> Evaluation:
        """Judge ``model`` in the course of training; raises ``Interrupted`` when ``should_stop()`` turns true.

        Args:
            model: unwrapped.
            losses: mean loss of every dataset of ``validation``.
            should_stop: asked now and then.
        """

    def conclude(self, trained: Trained, should_stop: StopCheck) -> Evaluation | None:
        """The last judgement, with what must not steer training; None when the last evaluation stands."""
