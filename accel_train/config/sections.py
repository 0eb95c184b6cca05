"""The configuration of an experiment: frozen dataclasses, validation, hash, experiment id.

Every default lives here and nowhere else; the command line (its names, types and help)
is derived from these classes. The module imports neither torch nor numpy, so reading or
refusing a configuration costs milliseconds.

A field whose metadata says ``result: False`` cannot change the trained bits (paths, logging,
timeouts) and is left out of :func:`config_hash`; so is what only another task reads.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from accel_train.errors import ConfigError

T = TypeVar("T")

SHARED_CORPORA = "corpora"
"""Directory under ``output_dir`` that all runs share."""


def _neutral(default: Any = MISSING, **kwargs: Any) -> Any:
    """A dataclass field that cannot change the result of a run."""
    if default is not MISSING:
        kwargs["default"] = default
    return field(metadata={"result": False}, **kwargs)


def _only_of(task: str, default: Any) -> Any:
    """A dataclass field that only one task reads."""
    return field(default=default, metadata={"task": task})


def _check(ok: bool, name: str, value: object, rule: str) -> None:
    if not ok:
        raise ConfigError(name, value, rule)


def _is_utf8(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_fraction(value: float) -> bool:
    return 0.0 <= value <= 1.0


def _check_finite(section: Any, prefix: str = "") -> None:
    for f in fields(section):
        value = getattr(section, f.name)
        if is_dataclass(value):
            _check_finite(value, f"{prefix}{f.name}.")
        for number in value if isinstance(value, tuple) else (value,):
            finite = not isinstance(number, float) or math.isfinite(number)
            _check(finite, f"{prefix}{f.name}", value, "must be a finite number")


@dataclass(frozen=True)
class GraphConfig:
    """Directed degree-corrected stochastic block model (Karrer and Newman 2011)."""

    n: int = 500
    """Number of vertices; a multiple of K."""
    K: int = 4
    """Number of equal blocks."""
    p_in: float = 0.25
    """Mean probability of an edge inside a block."""
    p_out: float = 0.03
    """Mean probability of an edge between blocks."""
    degree_exponent: float = 1.0
    """Exponent of the Zipf law of the expected degrees inside a block; 0 gives equal degrees."""
    max_attempts: int = 20
    """Seeds tried for a strongly connected graph before giving up."""

    def __post_init__(self) -> None:
        _check(self.K >= 2, "graph.K", self.K, "must be at least 2 (a rule needs another block)")
        _check(self.n >= 2 * self.K, "graph.n", self.n, f"must be at least 2 * graph.K = {2 * self.K}")
        _check(self.n % self.K == 0, "graph.n", self.n, f"is not divisible by graph.K = {self.K}; choose a multiple")
        _check(self.n <= 65_535, "graph.n", self.n, "must be at most 65535 (walks are stored as uint16)")
        for name in ("p_in", "p_out"):
            value = getattr(self, name)
            _check(0.0 < value <= 1.0, f"graph.{name}", value, "must lie in (0, 1]")
        _check(self.degree_exponent >= 0, "graph.degree_exponent", self.degree_exponent, "must not be negative")
        _check(self.max_attempts >= 1, "graph.max_attempts", self.max_attempts, "must be at least 1")


@dataclass(frozen=True)
class RulesConfig:
    """Jumper rules: a walk at a jumper must be in the rule's target block ``jump_length`` steps later."""

    jumpers_per_block: int = 2
    """Jumper vertices in every block; each carries one rule."""
    jump_lengths: tuple[int, ...] | None = None
    """Jump lengths in steps, dealt to the rules in turn; replaces jump_scales when set."""
    jump_scales: tuple[float, ...] = (0.25, 0.5, 0.7, 0.9)
    """Jump lengths as fractions of the context length, rounded to whole steps."""

    def __post_init__(self) -> None:
        name = "rules.jumpers_per_block"
        _check(self.jumpers_per_block >= 1, name, self.jumpers_per_block, "must be at least 1")
        if self.jump_lengths is not None:
            _check(len(self.jump_lengths) > 0, "rules.jump_lengths", self.jump_lengths, "must name at least one length")
            for length in self.jump_lengths:
                _check(length >= 1, "rules.jump_lengths", length, "must be at least 1 step")
        _check(len(self.jump_scales) > 0, "rules.jump_scales", self.jump_scales, "must name at least one fraction")
        for scale in self.jump_scales:
            _check(scale > 0, "rules.jump_scales", scale, "must be positive")

    def lengths(self, context_length: int) -> tuple[int, ...]:
        """The jump lengths in steps for a context of ``context_length`` tokens."""
        if self.jump_lengths is not None:
            return self.jump_lengths
        return tuple(max(1, round(scale * context_length)) for scale in self.jump_scales)


@dataclass(frozen=True)
class WalksConfig:
    """The corpus of random walks."""

    num_walks: int = 20_000
    """Walks in the training corpus."""
    walk_length: int = 256
    """Vertices in a walk; more than model.max_seq_len."""

    def __post_init__(self) -> None:
        _check(self.num_walks >= 1, "walks.num_walks", self.num_walks, "must be at least 1")
        _check(self.walk_length >= 2, "walks.walk_length", self.walk_length, "must be at least 2")


@dataclass(frozen=True)
class TextConfig:
    """The text corpus, its tokenizer, and how the model is tried on it."""

    corpus: str = "builtin"
    """Path of a text file or a directory of *.txt files, http(s) URL, or `builtin` (a generated bilingual corpus)."""
    corpus_sha256: str | None = None
    """SHA-256 (hex) that the corpus must have; null: not checked."""
    corpus_bytes: int | None = None
    """Size that a downloaded corpus must have; null: not checked."""
    builtin_bytes: int = 500_000
    """Size of the built-in corpus."""
    strip_gutenberg: bool = False
    """Leave out what Project Gutenberg puts before and after its books."""
    tokenizer: Literal["char", "bpe", "unigram"] = "bpe"
    """Kind of tokenizer."""
    vocab_size: int = 8000
    """Vocabulary size of a trained tokenizer; characters have a fixed one."""
    val_fraction: float | None = None
    """Part held out for validation; null: 0.05 for characters, 0.1 for subwords."""
    split: Literal["tail", "blocks"] | None = None
    """How the held-out part is cut; null: tail for characters, blocks for subwords."""
    stride: int | None = None
    """Tokens from one training window to the next; null: model.max_seq_len, so that windows do not overlap."""
    val_batches: int | None = None
    """Validate on so many batches, spread evenly; null: on the whole held-out part."""
    prompt: str = "The"
    """Prompt of the sample that every evaluation writes."""
    sample_tokens: int = 100
    """Length of the sample."""
    temperature: float = 1.0
    """Temperature of the sample; 0 takes the most likely token."""
    top_k: int | None = None
    """Sample from the so many most likely tokens; null: from all."""
    top_p: float | None = None
    """Sample from the fewest tokens whose probabilities add up to this; null: from all."""
    download_timeout: float = _neutral(30.0)
    """Seconds that a server may be silent."""
    download_attempts: int = _neutral(5)
    """Connections tried before a download is given up."""

    def __post_init__(self) -> None:
        _check(bool(self.corpus.strip()), "text.corpus", self.corpus, "must name a file, a URL, or 'builtin'")
        digest = self.corpus_sha256
        plain = digest is None or re.fullmatch(r"[0-9a-fA-F]{64}", digest) is not None
        _check(plain, "text.corpus_sha256", digest, "must be 64 hexadecimal digits")
        if self.tokenizer != "char":
            # Special tokens and the 256 bytes come first.
            _check(self.vocab_size > 260, "text.vocab_size", self.vocab_size, "must be more than 260 (all bytes)")
            _check(self.vocab_size <= 2**20, "text.vocab_size", self.vocab_size, "must be at most 1048576")
        if self.val_fraction is not None:
            _check(0 < self.val_fraction < 1, "text.val_fraction", self.val_fraction, "must lie in (0, 1)")
        for name in ("corpus_bytes", "builtin_bytes", "stride", "val_batches", "sample_tokens", "top_k"):
            value = getattr(self, name)
            _check(value is None or value >= 1, f"text.{name}", value, "must be at least 1")
        _check(bool(self.prompt), "text.prompt", self.prompt, "must not be empty")
        _check(self.temperature >= 0, "text.temperature", self.temperature, "must not be negative")
        _check(self.top_p is None or 0 < self.top_p <= 1, "text.top_p", self.top_p, "must lie in (0, 1]")
        _check(self.download_timeout > 0, "text.download_timeout", self.download_timeout, "must be positive")
        _check(self.download_attempts >= 1, "text.download_attempts", self.download_attempts, "must be at least 1")

    @property
    def held_out_fraction(self) -> float:
        """``val_fraction`` with its default resolved."""
        if self.val_fraction is not None:
            return self.val_fraction
        return 0.05 if self.tokenizer == "char" else 0.1

    @property
    def split_by(self) -> Literal["tail", "blocks"]:
        """``split`` with its default resolved."""
        if self.split is not None:
            return self.split
        return "tail" if self.tokenizer == "char" else "blocks"


@dataclass(frozen=True)
class ModelConfig:
    """GPT-2-style pre-norm decoder."""

    d_model: int = 128
    """Width of the residual stream."""
    n_layers: int = 4
    """Number of transformer blocks."""
    n_heads: int = 4
    """Attention heads per block; divides d_model."""
    d_ff: int | None = None
    """Width of the feed-forward layer; null: 4 * d_model."""
    max_seq_len: int = 64
    """Context length in tokens."""
    dropout: float = 0.0
    """Dropout probability on embeddings, attention weights and residual branches."""
    attention_dropout: float | None = None
    """Another one for attention weights; null: as dropout. 0 keeps attention's fused kernel, on CPU a fifth faster."""
    positions: Literal["learned", "rotary"] = "learned"
    """Position encoding; only learned positions can be exported as GPT-2."""
    tie_embeddings: bool = False
    """Share the weights of the token embedding and the output layer."""

    def __post_init__(self) -> None:
        for name in ("d_model", "n_layers", "n_heads", "max_seq_len"):
            value = getattr(self, name)
            _check(value >= 1, f"model.{name}", value, "must be at least 1")
        _check(
            self.d_model % self.n_heads == 0,
            "model.n_heads",
            self.n_heads,
            f"does not divide model.d_model = {self.d_model}; choose a divisor",
        )
        _check(self.d_ff is None or self.d_ff >= 1, "model.d_ff", self.d_ff, "must be at least 1")
        for name in ("dropout", "attention_dropout"):
            value = getattr(self, name)
            _check(value is None or 0.0 <= value < 1.0, f"model.{name}", value, "must lie in [0, 1)")
        if self.positions == "rotary":
            even = (self.d_model // self.n_heads) % 2 == 0
            _check(even, "model.n_heads", self.n_heads, "gives heads of odd width; rotary positions need even ones")

    @property
    def feed_forward_width(self) -> int:
        """``d_ff`` with its default resolved."""
        return 4 * self.d_model if self.d_ff is None else self.d_ff


@dataclass(frozen=True)
class TrainingConfig:
    """The training loop. A step is one optimizer update."""

    max_epochs: int = 50
    """Epochs at most; the earlier of max_epochs and max_steps ends training and sets the schedule."""
    max_steps: int = -1
    """Steps at most; -1: no limit of its own."""
    batch_size: int = 64
    """Samples per step over all processes and accumulation."""
    learning_rate: float = 3e-4
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates of the first and second moment."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay."""
    weight_decay_on: Literal["all", "matrices"] = "all"
    """Decay every parameter, or only those of two and more dimensions."""
    warmup_ratio: float = 0.1
    """Linear warm-up as a fraction of all steps."""
    warmup_steps: int | None = None
    """Linear warm-up in steps; wins over warmup_ratio when set."""
    min_lr_ratio: float = 0.1
    """Learning rate at the end of the cosine, as a fraction of the peak."""
    max_grad_norm: float | None = 1.0
    """Clip gradients at this global norm; null: no clipping."""
    gradient_accumulation_steps: int = 1
    """Micro-steps per step; divides batch_size."""
    eval_interval: int | None = None
    """Evaluate every so many steps; null: after every epoch."""
    log_interval: int = _neutral(10)
    """Steps between two log lines; losses stay on the device in between."""
    num_workers: int = _neutral(0)
    """Data-loading worker processes per rank."""
    deterministic: bool = True
    """Deterministic algorithms on GPU; off is faster and gives up equal bits."""
    cuda_graph: bool | None = _neutral(None)
    """On one GPU: record the step once and start it with a single launch; the same bits. What a loss or model of
    your own does in Python is then done once, so null records only steps of this package's models and losses."""
    timeout_seconds: float = _neutral(600.0)
    """A rank waits at most this long for the others."""
    lock_timeout: float = _neutral(60.0)
    """Seconds to wait for another process to leave the run directory."""
    init_from: str | None = _neutral(None)
    """Run directory or checkpoint whose weights start this new run; their digest is hashed."""

    def __post_init__(self) -> None:
        for name in ("max_epochs", "batch_size", "gradient_accumulation_steps", "log_interval"):
            value = getattr(self, name)
            _check(value >= 1, f"training.{name}", value, "must be at least 1")
        _check(
            self.max_steps == -1 or self.max_steps >= 1,
            "training.max_steps",
            self.max_steps,
            "must be at least 1, or -1 for no limit",
        )
        for name in ("learning_rate", "eps", "timeout_seconds"):
            value = getattr(self, name)
            _check(value > 0, f"training.{name}", value, "must be positive")
        _check(self.lock_timeout >= 0, "training.lock_timeout", self.lock_timeout, "must not be negative")
        for beta in self.betas:
            _check(0.0 <= beta < 1.0, "training.betas", self.betas, "must lie in [0, 1)")
        _check(self.weight_decay >= 0, "training.weight_decay", self.weight_decay, "must not be negative")
        for name in ("warmup_ratio", "min_lr_ratio"):
            _check(_is_fraction(getattr(self, name)), f"training.{name}", getattr(self, name), "must lie in [0, 1]")
        for name in ("warmup_steps", "num_workers"):
            value = getattr(self, name)
            _check(value is None or value >= 0, f"training.{name}", value, "must not be negative")
        norm = self.max_grad_norm
        _check(norm is None or norm > 0, "training.max_grad_norm", norm, "must be positive; null turns clipping off")
        interval = self.eval_interval
        _check(interval is None or interval >= 1, "training.eval_interval", interval, "must be at least 1")
        _check(
            self.batch_size % self.gradient_accumulation_steps == 0,
            "training.batch_size",
            self.batch_size,
            f"is not divisible by training.gradient_accumulation_steps = {self.gradient_accumulation_steps}",
        )

    def check_world_size(self, world_size: int) -> None:
        """Raise :class:`ConfigError` unless every rank gets equal slices of a batch."""
        parts = world_size * self.gradient_accumulation_steps
        _check(
            self.batch_size % parts == 0,
            "training.batch_size",
            self.batch_size,
            f"is not divisible by {world_size} processes x {self.gradient_accumulation_steps} accumulation "
            f"steps; choose a multiple of {parts}",
        )


@dataclass(frozen=True)
class GateConfig:
    """The sufficiency gate: generate, score against ground truth, stop when the model behaves."""

    num_sequences: int = _only_of("walks", 1000)
    """Held-out sequences that the model continues."""
    prompt_length: int = _only_of("walks", 8)
    """Tokens of each held-out sequence given as the prompt."""
    edge_threshold: float = _only_of("walks", 0.95)
    """Greedy edge compliance must exceed this."""
    rule_threshold: float = _only_of("walks", 0.80)
    """Greedy rule compliance must exceed this."""
    sampled_rule_threshold: float | None = _only_of("walks", None)
    """Rule compliance under sampling at temperature 1 must exceed this; null: reported only."""
    rule_lift_threshold: float | None = _only_of("walks", None)
    """Greedy rule compliance must exceed a rule-blind walk's by more than this; null: reported only."""
    min_rule_checks: int = _only_of("walks", 100)
    """Fewer rule checks than this fail the gate as thin evidence."""
    stop_on_pass: bool | None = None
    """End training when the gate passes; null: true for walks, false for text."""
    unscorable_rules: Literal["exclude", "error"] = _only_of("walks", "exclude")
    """What to do with rules whose jump is longer than the context."""
    val_loss_threshold: float | None = _only_of("text", 5.0)
    """Validation loss (nats per token) must be below this; null: reported only, as for all that follow."""
    overfit_gap_threshold: float | None = _only_of("text", 0.5)
    """Validation loss less training loss, both measured on the final model, must be below this."""
    repetition_threshold: float | None = _only_of("text", 0.5)
    """No sample may repeat its own runs of four tokens more often than this."""
    language_threshold: float | None = _only_of("text", 0.7)
    """Share of samples that go on in the language of their prompt; judged when the corpus holds English and Spanish."""
    loss_rises_threshold: int | None = _only_of("text", 0)
    """The mean training loss may rise from one epoch to the next so many times."""
    latency_p95_ms_threshold: float | None = _only_of("text", 250.0)
    """95 of 100 tokens must be generated within so many milliseconds each."""
    rss_mb_threshold: float | None = _only_of("text", 400.0)
    """Megabytes that a process may need that only loads the model and generates."""

    def __post_init__(self) -> None:
        for name in ("num_sequences", "prompt_length"):
            value = getattr(self, name)
            _check(value >= 1, f"gate.{name}", value, "must be at least 1")
        for name in ("edge_threshold", "rule_threshold", "sampled_rule_threshold", "rule_lift_threshold"):
            value = getattr(self, name)
            _check(value is None or _is_fraction(value), f"gate.{name}", value, "must lie in [0, 1]")
        for name in (
            "val_loss_threshold",
            "overfit_gap_threshold",
            "repetition_threshold",
            "loss_rises_threshold",
            "latency_p95_ms_threshold",
            "rss_mb_threshold",
        ):
            value = getattr(self, name)
            _check(value is None or value >= 0, f"gate.{name}", value, "must not be negative")
        language = self.language_threshold
        _check(language is None or _is_fraction(language), "gate.language_threshold", language, "must lie in [0, 1]")
        _check(self.min_rule_checks >= 0, "gate.min_rule_checks", self.min_rule_checks, "must not be negative")


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written, beside the one at the end of every epoch, and which are kept."""

    every_steps: int | None = _neutral(None)
    """Also write a checkpoint every so many steps; null: at the end of every epoch only."""
    keep_last: int = _neutral(3)
    """Newest checkpoints kept; the one that passed the gate is kept besides."""
    verify: Literal["full", "size"] = _neutral("full")
    """What a resume compares with the manifest: the digest of every file, or sizes only."""

    def __post_init__(self) -> None:
        every = self.every_steps
        _check(every is None or every >= 1, "checkpoint.every_steps", every, "must be at least 1")
        _check(self.keep_last >= 1, "checkpoint.keep_last", self.keep_last, "must be at least 1")


@dataclass(frozen=True)
class HooksConfig:
    """Hooks by registered name or by import path (`package.module:factory`)."""

    forward: tuple[str, ...] = ()
    """Forward hooks: observe activations, never change outputs."""
    update: tuple[str, ...] = ()
    """Update hooks: receive the gradients before clipping and may transform them."""


@dataclass(frozen=True)
class TrackingConfig:
    """Experiment trackers, through Accelerate; off by default."""

    log_with: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = _neutral(())
    """Trackers that receive every log line."""
    project: str = _neutral("accel_train")
    """Project name given to the trackers."""


@dataclass(frozen=True)
class ExperimentConfig:
    """One experiment: a task, a model and how it is trained, judged and stored."""

    task: Literal["walks", "text"] = "walks"
    """What is learned."""
    seed: int = 42
    """Seed of everything random."""
    name: str | None = _neutral(None)
    """Name of the run directory; null: the experiment id."""
    description: str = _neutral("")
    """Free text for the record."""
    tags: tuple[str, ...] = _neutral(())
    """Labels for the record."""
    output_dir: str = _neutral("results")
    """Directory that holds the run directories and the shared corpora."""
    graph: GraphConfig = field(default_factory=GraphConfig)
    """The graph."""
    rules: RulesConfig = field(default_factory=RulesConfig)
    """The rules."""
    walks: WalksConfig = field(default_factory=WalksConfig)
    """The corpus of walks."""
    text: TextConfig = field(default_factory=TextConfig)
    """The text corpus."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The model."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """The loop."""
    gate: GateConfig = field(default_factory=GateConfig)
    """The sufficiency gate."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Checkpoints."""
    hooks: HooksConfig = field(default_factory=HooksConfig)
    """Hooks."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Trackers."""

    def __post_init__(self) -> None:
        _check_finite(self)
        _check(0 <= self.seed < 2**63, "seed", self.seed, "must lie in [0, 2**63)")
        _check(bool(self.output_dir.strip()), "output_dir", self.output_dir, "must name a directory")
        for name, path in (
            ("output_dir", self.output_dir),
            ("text.corpus", self.text.corpus),
            ("training.init_from", self.training.init_from),
        ):
            # A record names it, and records are UTF-8.
            _check(path is None or _is_utf8(path), name, path, "is not a name in UTF-8; rename it")
        if self.name is not None:
            plain = re.fullmatch(r"[^/\x00-\x1f]{1,200}", self.name) is not None and self.name.strip() == self.name
            plain = plain and not self.name.startswith(".") and ".archived-" not in self.name
            _check(
                plain,
                "name",
                self.name,
                "must be a plain directory name: at most 200 characters, no '/', no leading dot, no '.archived-'",
            )
            _check(self.name != SHARED_CORPORA, "name", self.name, "is taken by the shared corpora; choose another")
        if self.task == "walks":
            self._check_walks()

    def _check_walks(self) -> None:
        context = self.model.max_seq_len
        _check(
            self.rules.jumpers_per_block <= self.graph.n // self.graph.K,
            "rules.jumpers_per_block",
            self.rules.jumpers_per_block,
            f"exceeds the {self.graph.n // self.graph.K} vertices of a block (graph.n / graph.K)",
        )
        _check(
            self.walks.walk_length > context,
            "walks.walk_length",
            self.walks.walk_length,
            f"is shorter than model.max_seq_len + 1 = {context + 1}; use longer walks or a shorter context",
        )
        chunks = self.walks.num_walks * (self.walks.walk_length // (context + 1))
        _check(
            chunks >= self.training.batch_size,
            "walks.num_walks",
            self.walks.num_walks,
            f"gives {chunks} training samples, fewer than training.batch_size = {self.training.batch_size}; "
            "use more walks or a smaller batch",
        )
        _check(
            self.gate.prompt_length <= context,
            "gate.prompt_length",
            self.gate.prompt_length,
            f"leaves nothing to generate inside model.max_seq_len = {context}; use a shorter prompt",
        )
        if self.gate.unscorable_rules == "error":
            source = "rules.jump_scales" if self.rules.jump_lengths is None else "rules.jump_lengths"
            for length in self.rules.lengths(context):
                _check(
                    length <= context,
                    source,
                    length,
                    f"is a jump longer than the context (model.max_seq_len = {context}), which "
                    "gate.unscorable_rules = 'error' forbids; shorten the jump or lengthen the context",
                )

    @property
    def stop_on_pass(self) -> bool:
        """Whether training ends when the gate passes."""
        return self.task == "walks" if self.gate.stop_on_pass is None else self.gate.stop_on_pass


TASK_SECTIONS = {"walks": frozenset({"graph", "rules", "walks"}), "text": frozenset({"text"})}
"""Sections that only one task reads."""


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as plain JSON values (tuples become lists)."""
    return {f.name: _plain(getattr(config, f.name)) for f in fields(config)}


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return to_dict(value)
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def from_dict(values: Mapping[str, Any], cls: type[T] = ExperimentConfig) -> T:  # type: ignore[assignment]
    """The inverse of :func:`to_dict`, for configurations that this package wrote.

    Raises:
        ConfigError: an unknown field, or a value that breaks a rule.
    """
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        if name not in known:
            raise ConfigError(name, value, f"is not a field of {cls.__name__}")
        factory = known[name].default_factory
        if isinstance(value, Mapping) and isinstance(factory, type):
            arguments[name] = from_dict(value, factory)
        else:
            arguments[name] = tuple(value) if isinstance(value, list) else value
    return cls(**arguments)


def result_values(config: Any, task: str | None = None) -> Iterator[tuple[str, Any]]:
    """``(name, plain value)`` of every field of a configuration object that changes the result of ``task`` (or any)."""
    for f in fields(config):
        if f.metadata.get("result", True) and (task is None or f.metadata.get("task", task) == task):
            value = getattr(config, f.name)
            yield f.name, dict(result_values(value, task)) if is_dataclass(value) else _plain(value)


def hashed_fields(config: ExperimentConfig) -> dict[str, Any]:
    """The fields that change the result, as nested JSON values."""
    other_tasks = frozenset().union(*(names for task, names in TASK_SECTIONS.items() if task != config.task))
    return {name: value for name, value in result_values(config, config.task) if name not in other_tasks}


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def config_hash(config: ExperimentConfig, init_digest: str | None = None) -> str:
    """SHA-256 (hex) of every field that changes the result.

    Args:
        config: the configuration.
        init_digest: digest of the weights that ``training.init_from`` names, if it is set.
    """
    values: dict[str, Any] = hashed_fields(config)
    if init_digest is not None:
        values["init_digest"] = init_digest
    return hashlib.sha256(canonical_json(values).encode()).hexdigest()


def experiment_id(config: ExperimentConfig, init_digest: str | None = None) -> str:
    """A readable name such as ``walks_n500_w64_d128_L4_s42-1f2e3d4c``."""
    model = config.model
    text = config.text
    size = f"n{config.graph.n}" if config.task == "walks" else f"{text.tokenizer}{text.vocab_size}"
    if config.task == "text" and text.tokenizer == "char":
        size = "char"
    slug = f"{config.task}_{size}_w{model.max_seq_len}_d{model.d_model}_L{model.n_layers}_s{config.seed}"
    return f"{slug}-{config_hash(config, init_digest)[:8]}"


def differing_fields(ours: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Lines such as ``training.learning_rate: 0.001 here, 0.0003 there`` for two nested dictionaries."""
    lines: list[str] = []
    for name in sorted({*ours, *theirs}):
        a, b = ours.get(name), theirs.get(name)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += differing_fields(a, b, f"{prefix}{name}.")
        elif a != b:
            lines.append(f"{prefix}{name}: {a!r} here, {b!r} there")
    return lines


def run_directory(config: ExperimentConfig, init_digest: str | None = None) -> Path:
    """Where the run lives: ``output_dir / (name or experiment id)``."""
    return Path(config.output_dir) / (config.name or experiment_id(config, init_digest))


@dataclass(frozen=True)
class EarlierRun:
    """What a launch does with the run that it finds in its directory; no part of the configuration."""

    fresh: bool = False
    """Archive it and start over."""
    on_damage: Literal["refuse", "restart"] = "refuse"
    """When every checkpoint is damaged: refuse to go on, or set them aside and start over."""


def check_output_dir(config: ExperimentConfig) -> None:
    """Raise :class:`ConfigError` unless the output directory can be written; creates nothing."""
    path = Path(config.output_dir).absolute()
    existing = path
    while not existing.exists():
        existing = existing.parent
    _check(existing.is_dir(), "output_dir", config.output_dir, f"is not a directory: {existing} is a file")
    shared = path / SHARED_CORPORA
    clear = shared.is_dir() or not shared.exists()
    _check(clear, "output_dir", config.output_dir, f"holds a file named {SHARED_CORPORA}; move it or choose another")
    writable = os.access(existing, os.W_OK | os.X_OK) and not _read_only(existing)
    _check(writable, "output_dir", config.output_dir, f"is not writable ({existing}); choose another")


def _read_only(path: Path) -> bool:
    return bool(os.statvfs(path).f_flag & os.ST_RDONLY)
