"""The common sections of an experiment's configuration.

What only one task reads is a section of that task, beside these (see :func:`experiment_class`). Every default
lives in a section and nowhere else. The module imports neither torch nor numpy, so reading or refusing a
configuration costs milliseconds.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, cast

from pydantic import Field

from accel_train.config.fields import (
    Count,
    CountOrZero,
    Fraction,
    FractionBelowOne,
    NotNegative,
    Positive,
    check,
    neutral,
    section,
)
from accel_train.errors import ConfigError

SHARED_CORPORA = "corpora"
"""Directory under ``output_dir`` that all runs share."""


@section("model")
class ModelConfig:
    """GPT-2-style pre-norm decoder."""

    d_model: Count = 128
    """Width of the residual stream."""
    n_layers: Count = 4
    """Number of transformer blocks."""
    n_heads: Count = 4
    """Attention heads per block; divides d_model."""
    d_ff: Count | None = None
    """Width of the feed-forward layer; null: 4 * d_model."""
    max_seq_len: Count = 64
    """Context length in tokens."""
    dropout: FractionBelowOne = 0.0
    """Dropout probability on embeddings, attention weights and residual branches."""
    attention_dropout: FractionBelowOne | None = None
    """Another one for attention weights; null: as dropout. 0 keeps attention's fused kernel, on CPU a fifth faster."""
    positions: Literal["learned", "rotary"] = "learned"
    """Position encoding; only learned positions can be exported as GPT-2."""
    tie_embeddings: bool = False
    """Share the weights of the token embedding and the output layer."""

    def __post_init__(self) -> None:
        divides = self.d_model % self.n_heads == 0
        rule = f"does not divide model.d_model = {self.d_model}; choose a divisor"
        check(divides, "model.n_heads", self.n_heads, rule)
        if self.positions == "rotary":
            even = (self.d_model // self.n_heads) % 2 == 0
            check(even, "model.n_heads", self.n_heads, "gives heads of odd width; rotary positions need even ones")

    @property
    def feed_forward_width(self) -> int:
        """``d_ff`` with its default resolved."""
        return 4 * self.d_model if self.d_ff is None else self.d_ff


@section("training")
class TrainingConfig:
    """The training loop. A step is one optimizer update."""

    max_epochs: Count = 50
    """Epochs at most; the earlier of max_epochs and max_steps ends training and sets the schedule."""
    max_steps: int = -1
    """Steps at most; -1: no limit of its own."""
    batch_size: Count = 64
    """Samples per step over all processes and accumulation."""
    learning_rate: Positive = 3e-4
    """Peak learning rate."""
    betas: tuple[FractionBelowOne, FractionBelowOne] = (0.9, 0.999)
    """AdamW's decay rates of the first and second moment."""
    eps: Positive = 1e-8
    """AdamW's epsilon."""
    weight_decay: NotNegative = 0.01
    """AdamW's decoupled weight decay."""
    weight_decay_on: Literal["all", "matrices"] = "all"
    """Decay every parameter, or only those of two and more dimensions."""
    warmup_ratio: Fraction = 0.1
    """Linear warm-up as a fraction of all steps."""
    warmup_steps: CountOrZero | None = None
    """Linear warm-up in steps; wins over warmup_ratio when set."""
    min_lr_ratio: Fraction = 0.1
    """Learning rate at the end of the cosine, as a fraction of the peak."""
    max_grad_norm: Positive | None = 1.0
    """Clip gradients at this global norm; null: no clipping."""
    gradient_accumulation_steps: Count = 1
    """Micro-steps per step; divides batch_size."""
    eval_interval: Count | None = None
    """Evaluate every `eval_interval` steps; null: after every epoch."""
    log_interval: Count = neutral(default=10)
    """Steps between two log lines; losses stay on the device in between."""
    num_workers: CountOrZero = neutral(default=0)
    """Data-loading worker processes per rank."""
    deterministic: bool = True
    """Deterministic algorithms on GPU; off is faster and gives up equal bits."""
    cuda_graph: bool | None = neutral(default=None)
    """On one GPU: record the step once and start it with a single launch; the same bits. What a loss or model of
    your own does in Python is then done once, so null records only steps of this package's models and losses."""
    timeout_seconds: Positive = neutral(default=600.0)
    """A rank waits at most this long for the others."""

    def __post_init__(self) -> None:
        bounded = self.max_steps == -1 or self.max_steps >= 1
        check(bounded, "training.max_steps", self.max_steps, "must be at least 1, or -1 for no limit")
        accumulated = self.gradient_accumulation_steps
        rule = f"is not divisible by training.gradient_accumulation_steps = {accumulated}"
        check(self.batch_size % accumulated == 0, "training.batch_size", self.batch_size, rule)

    def check_world_size(self, world_size: int) -> None:
        """Raise :class:`ConfigError` unless every rank gets equal slices of a batch."""
        parts = world_size * self.gradient_accumulation_steps
        product = f"{world_size} processes x {self.gradient_accumulation_steps} accumulation steps"
        rule = f"is not divisible by {product}; choose a multiple of {parts}"
        check(self.batch_size % parts == 0, "training.batch_size", self.batch_size, rule)


@section("checkpoint")
class CheckpointConfig:
    """When checkpoints are written, beside the one at the end of every epoch, and which are kept."""

    every_steps: Count | None = neutral(default=None)
    """Also write a checkpoint every `every_steps` steps; null: at the end of every epoch only."""
    keep_last: Count = neutral(default=3)
    """Newest checkpoints kept; the first that passed the gate and the best on held-out data are kept besides."""
    verify: Literal["full", "size"] = neutral(default="full")
    """What a resume compares with the manifest: the digest of every file, or sizes only."""


@section("start")
class StartConfig:
    """How a launch begins."""

    weights: str | None = neutral(default=None)
    """Run directory or checkpoint whose weights start this new run; their digest is hashed."""
    lock_timeout: NotNegative = neutral(default=60.0)
    """Seconds to wait for another process to leave the run directory."""


@section("hooks")
class HooksConfig:
    """Hooks by registered name or by import path (`package.module:factory`)."""

    forward: tuple[str, ...] = ()
    """Forward hooks: observe activations, never change outputs."""
    update: tuple[str, ...] = ()
    """Update hooks: receive the gradients before clipping and may transform them."""


@section("tracking")
class TrackingConfig:
    """Experiment trackers, through Accelerate; off by default."""

    log_with: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = neutral(default=())
    """Trackers that receive every log line."""
    project: str = neutral(default="accel_train")
    """Project name given to the trackers."""


@section("")
class ExperimentConfig:
    """One experiment: a task, a model and how it is trained, judged and stored."""

    section_name: ClassVar[str] = ""
    """Name of the field that holds the task's own section; empty in the base class."""

    task: str = "walks"
    """What is learned: walks, text, or a task of your own as `package.module:Class`."""
    seed: int = 42
    """Seed of everything random."""
    name: str | None = neutral(default=None)
    """Name of the run directory; null: the experiment id."""
    description: str = neutral(default="")
    """Free text for the record."""
    tags: tuple[str, ...] = neutral(default=())
    """Labels for the record."""
    output_dir: str = neutral(default="results")
    """Directory that holds the run directories and the shared corpora."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The model."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """The loop."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Checkpoints."""
    start: StartConfig = field(default_factory=StartConfig)
    """How a launch begins."""
    hooks: HooksConfig = field(default_factory=HooksConfig)
    """Hooks."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Trackers."""

    def __post_init__(self) -> None:
        check(0 <= self.seed < 2**63, "seed", self.seed, "must lie in [0, 2**63)")
        check(bool(self.output_dir.strip()), "output_dir", self.output_dir, "must name a directory")
        check_path("output_dir", self.output_dir)
        check_path("start.weights", self.start.weights)
        if self.name is not None:
            plain = re.fullmatch(r"[^/\x00-\x1f]{1,200}", self.name) is not None and self.name.strip() == self.name
            plain = plain and not self.name.startswith(".") and ".archived-" not in self.name
            rule = "must be a plain directory name: at most 200 characters, no '/', no leading dot, no '.archived-'"
            check(plain, "name", self.name, rule)
            check(self.name != SHARED_CORPORA, "name", self.name, "is taken by the shared corpora; choose another")
        if check_task := getattr(self.section, "check", None):
            check_task(self)

    @property
    def section(self) -> Any:
        """The task's own section; None in the base class."""
        return getattr(self, self.section_name) if self.section_name else None


@functools.cache
def experiment_class(name: str, section_class: type) -> type[ExperimentConfig]:
    """Return the configuration class with a task's own section beside the common ones.

    Args:
        name: of the section.
        section_class: its class; one that is no section yet becomes one.

    Raises:
        ConfigError: a common field has this name, or a field of the section has no default.
    """
    if name in ExperimentConfig.__dataclass_fields__ or not name.isidentifier():
        raise ConfigError("task", name, "cannot be the name of a task's section; choose another")
    if not hasattr(section_class, "__pydantic_fields__"):
        section_class = section(name)(section_class)
    for field_name, about in section_class.__pydantic_fields__.items():
        check(not about.is_required(), "task", f"{name}.{field_name}", "is a field without a default; give it one")
    described = Field(default_factory=section_class, description=(section_class.__doc__ or "").partition("\n")[0])
    namespace = {"__module__": __name__, "__doc__": ExperimentConfig.__doc__, "__annotations__": {name: section_class}}
    namespace |= {"section_name": name, name: described}
    return cast(type[ExperimentConfig], section("")(type("ExperimentConfig", (ExperimentConfig,), namespace)))


def check_path(name: str, path: str | None) -> None:
    """Refuse a path that no record could name, since records are UTF-8."""
    try:
        (path or "").encode()
    except UnicodeEncodeError:
        raise ConfigError(name, path, "is not a name in UTF-8; rename it") from None


@dataclass(frozen=True)
class EarlierRun:
    """What a launch does with the run that it finds in its directory; no part of the configuration."""

    fresh: bool = False
    """Archive it and start over."""
    on_damage: Literal["refuse", "restart"] = "refuse"
    """When every checkpoint is damaged: refuse to go on, or set them aside and start over."""
