"""What an experiment needs from a task, and what only a task knows.

A task is one class and one section of the configuration. It knows nothing of ranks, signals or files of the
run: the experiment calls ``check``, ``build``, ``preflight``, ``evaluate`` and ``conclude`` on the main process
only, ``open`` on every rank, and hands a :class:`~accel_train.process.work.WorkContext` to what may take long.
A task of your own derives from :class:`Task` and is named as ``package.module:Class``; ``examples/own_task``
is one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from accel_train.config.sections import ExperimentConfig
from accel_train.errors import ConfigError
from accel_train.process.work import WorkContext
from accel_train.tasks import drawing
from accel_train.tasks.criteria import Verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch import nn


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
        """Return JSON values, with ``metrics`` in any case."""
        found = {"metrics": self.metrics} if self.verdict is None else self.verdict.to_dict()
        return {**found, "samples": self.samples} if self.samples else found


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


@dataclass(frozen=True)
class GenerationOptions:
    """How ``accel-train generate`` asks a task to write; None takes what the task or its configuration says."""

    num: int | None = None
    """Sequences to write."""
    prompt: str | None = None
    """Text to continue."""
    max_tokens: int | None = None
    """Tokens to write after the prompt."""
    temperature: float | None = None
    """0 takes the most likely token."""
    top_k: int | None = None
    """Sample from the `top_k` most likely tokens."""
    top_p: float | None = None
    """Sample from the fewest tokens whose probabilities add up to `top_p`."""
    seed: int | None = None
    """Seed of the samples."""

    def given(self) -> dict[str, Any]:
        """Return the options that were given."""
        return {name: value for name, value in vars(self).items() if value is not None}


class Task(ABC):
    """One thing to learn, and how it is judged.

    Args:
        config: of the experiment; ``config.section`` is an object of the task's own ``Config``.
    """

    name: ClassVar[str]
    """Name of the task's section, and the first word of the names of its runs."""
    Config: ClassVar[type]
    """Class of the section (see :func:`accel_train.config.fields.section`). A property ``slug`` joins the names of
    runs, a method ``check(config)`` refuses what does not fit the common sections."""
    headline: ClassVar[Mapping[str, str]] = {}
    """Metrics of the line that ends an epoch, with their short names."""
    columns: ClassVar[Mapping[str, str]] = {}
    """Columns of ``accel-train runs``: heading and scalar of the record."""
    curves: ClassVar[Sequence[str]] = ()
    """Metrics of which the record keeps one value per evaluation."""
    own_scalars: ClassVar[frozenset[str]] = frozenset()
    """Metrics that stand under their own name among the record's scalars; others as ``final_<metric>``."""
    advice: ClassVar[Mapping[str, str]] = {}
    """What to try for a criterion that was missed, by metric."""
    generation_options: ClassVar[frozenset[str]] = frozenset()
    """Options of ``accel-train generate`` that the task takes."""

    def __init__(self, config: ExperimentConfig) -> None:
        self.config = config

    # -- data ------------------------------------------------------------------------------

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Size of the model's vocabulary; a function of the configuration."""

    def check(self, work: WorkContext) -> None:  # noqa: B027 - optional
        """Refuse, writing nothing, what cannot work; raises ``ConfigError``."""

    @abstractmethod
    def build(self, shared: Path, work: WorkContext) -> str:
        """Build or reuse the artifacts under ``shared``, which all runs share; returns their directory."""

    @abstractmethod
    def open(self, artifacts: str) -> Any:
        """Return the training dataset over the artifacts that ``build`` returned, without copying them."""

    def validation(self) -> dict[str, Any]:
        """Return datasets, by name, whose loss every evaluation measures; after ``open``."""
        return {}

    def digests(self) -> dict[str, str]:
        """Return what the data is made of: a run does not go on with other data than it began with; after ``open``."""
        return {}

    def files(self) -> dict[str, bytes]:
        """Return small files that belong into every checkpoint; after ``open``."""
        return {}

    # -- the gate --------------------------------------------------------------------------

    @property
    def stops_on_pass(self) -> bool:
        """Whether training ends when the gate passes: ``gate.stop_on_pass`` of the section, else true."""
        return bool(getattr(getattr(self.config.section, "gate", None), "stop_on_pass", True))

    def preflight(self, work: WorkContext) -> dict[str, Any]:
        """Return what the gate can reach, as JSON values with ``reachable`` and ``warnings``; after ``open``."""
        return {"reachable": True, "warnings": []}

    @abstractmethod
    def evaluate(self, model: nn.Module, losses: Mapping[str, float], work: WorkContext) -> Evaluation:
        """Judge ``model`` in the course of training.

        Args:
            model: unwrapped.
            losses: mean loss of every dataset of ``validation``.
            work: asked now and then whether to stop.

        Raises:
            Interrupted: it is to stop.
        """

    def conclude(self, trained: Trained, work: WorkContext) -> Evaluation | None:
        """Return the last judgement, with what must not steer training; None when the last evaluation stands."""
        return None

    # -- the record ------------------------------------------------------------------------

    def scalars(
        self, evaluations: Sequence[Mapping[str, Any]], seconds: Sequence[Mapping[str, float]]
    ) -> dict[str, Any]:
        """Return what the record's scalars hold beside the figures of the last evaluation.

        Args:
            evaluations: every evaluation so far: ``step``, ``epoch``, ``metrics``.
            seconds: of training up to evaluations: ``step``, ``training_seconds``.
        """
        return {}

    def draw(self, axes: Axes, record: Mapping[str, Any]) -> None:
        """Draw the right half of the run's figure; by default every curve, with the thresholds of the gate."""
        drawing.curves(axes, record, {name: name for name in self.curves})

    # -- the model in use ------------------------------------------------------------------

    def prepare_generation(self, checkpoint: Path, shared: Path) -> None:  # noqa: B027 - optional
        """Load what :meth:`generate` needs: from the checkpoint, or from the artifacts under ``shared``."""

    def generate(self, model: nn.Module, options: GenerationOptions) -> Iterator[str]:
        """Yield what the model writes, piece by piece; after :meth:`prepare_generation`."""
        raise ConfigError("RUN", self.name, "is a task that does not generate")
