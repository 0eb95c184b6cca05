"""The section of the walks task: graph, rules, corpus and gate."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

from annotated_types import Ge, Le

from accel_train.config import fields
from accel_train.config.sections import ExperimentConfig


@fields.section("walks.graph")
class GraphConfig:
    """Directed degree-corrected stochastic block model (Karrer and Newman 2011)."""

    n: int = 500
    """Number of vertices; a multiple of K."""
    K: int = 4
    """Number of equal blocks."""
    p_in: fields.PositiveFraction = 0.25
    """Mean probability of an edge inside a block."""
    p_out: fields.PositiveFraction = 0.03
    """Mean probability of an edge between blocks."""
    degree_exponent: fields.NotNegative = 1.0
    """Exponent of the Zipf law of the expected degrees inside a block; 0 gives equal degrees."""
    max_attempts: fields.Count = 20
    """Seeds tried for a strongly connected graph before giving up."""

    def __post_init__(self) -> None:
        fields.check(self.K >= 2, "walks.graph.K", self.K, "must be at least 2 (a rule needs another block)")
        least = 2 * self.K
        fields.check(self.n >= least, "walks.graph.n", self.n, f"must be at least 2 * walks.graph.K = {least}")
        rule = f"is not divisible by walks.graph.K = {self.K}; choose a multiple"
        fields.check(self.n % self.K == 0, "walks.graph.n", self.n, rule)
        fields.check(self.n <= 65_535, "walks.graph.n", self.n, "must be at most 65535 (walks are stored as uint16)")


@fields.section("walks.rules")
class RulesConfig:
    """Jumper rules: a walk at a jumper must be in the rule's target block ``jump_length`` steps later."""

    jumpers_per_block: fields.Count = 2
    """Jumper vertices in every block; each carries one rule."""
    jump_lengths: tuple[fields.Count, ...] | None = None
    """Jump lengths in steps, dealt to the rules in turn; replaces jump_scales when set."""
    jump_scales: tuple[fields.Positive, ...] = (0.25, 0.5, 0.7, 0.9)
    """Jump lengths as fractions of the context length, rounded to whole steps."""

    def __post_init__(self) -> None:
        lengths, scales = self.jump_lengths, self.jump_scales
        fields.check(lengths != (), "walks.rules.jump_lengths", lengths, "must name at least one length")
        fields.check(scales != (), "walks.rules.jump_scales", scales, "must name at least one fraction")

    @property
    def source(self) -> str:
        """The field that the jump lengths come from."""
        return "walks.rules.jump_scales" if self.jump_lengths is None else "walks.rules.jump_lengths"

    def lengths(self, context_length: int) -> tuple[int, ...]:
        """Return the jump lengths in steps for a context of ``context_length`` tokens."""
        if self.jump_lengths is not None:
            return self.jump_lengths
        return tuple(max(1, round(scale * context_length)) for scale in self.jump_scales)


@fields.section("walks.gate")
class GateConfig:
    """The sufficiency gate: generate, score against ground truth, stop when the model behaves."""

    num_sequences: fields.Count = 1000
    """Held-out sequences that the model continues."""
    prompt_length: fields.Count = 8
    """Tokens of each held-out sequence given as the prompt."""
    edge_threshold: fields.Fraction = 0.95
    """Greedy edge compliance must exceed this."""
    rule_threshold: fields.Fraction = 0.80
    """Greedy rule compliance must exceed this."""
    sampled_rule_threshold: fields.Fraction | None = None
    """Rule compliance under sampling at temperature 1 must exceed this; null: reported only."""
    rule_lift_threshold: fields.Fraction | None = None
    """Greedy rule compliance must exceed a rule-blind walk's by more than this; null: reported only."""
    min_rule_checks: fields.CountOrZero = 100
    """Fewer rule checks than this fail the gate as thin evidence."""
    stop_on_pass: bool = True
    """End training when the gate passes."""
    unscorable_rules: Literal["exclude", "error"] = "exclude"
    """What to do with rules whose jump is longer than the context."""


@fields.section("walks")
class WalksConfig:
    """Random walks on a block-model graph in which every rule is obeyed."""

    num_walks: fields.Count = 20_000
    """Walks in the training corpus."""
    walk_length: Annotated[int, Ge(2), Le(2**31)] = 256
    """Vertices in a walk; more than model.max_seq_len."""
    graph: GraphConfig = field(default_factory=GraphConfig)
    """The graph."""
    rules: RulesConfig = field(default_factory=RulesConfig)
    """The rules."""
    gate: GateConfig = field(default_factory=GateConfig)
    """The gate."""

    @property
    def slug(self) -> str:
        """What the name of a run says of this section."""
        return f"n{self.graph.n}"

    def check(self, config: ExperimentConfig) -> None:
        """Refuse what does not fit the model and the loop.

        Raises:
            ConfigError: jumpers, walks, prompt or jumps do not fit.
        """
        context, batch = config.model.max_seq_len, config.training.batch_size
        graph, rules, gate = self.graph, self.rules, self.gate
        block = graph.n // graph.K
        rule = f"exceeds the {block} vertices of a block (walks.graph.n / walks.graph.K)"
        jumpers = rules.jumpers_per_block
        fields.check(jumpers <= block, "walks.rules.jumpers_per_block", jumpers, rule)
        rule = f"is shorter than model.max_seq_len + 1 = {context + 1}; use longer walks or a shorter context"
        fields.check(self.walk_length > context, "walks.walk_length", self.walk_length, rule)
        chunks = self.num_walks * (self.walk_length // (context + 1))
        rule = f"gives {chunks} training samples, fewer than training.batch_size = {batch}"
        cure = "use more walks or a smaller batch"
        fields.check(chunks >= batch, "walks.num_walks", self.num_walks, f"{rule}; {cure}")
        rule = f"leaves nothing to generate inside model.max_seq_len = {context}; use a shorter prompt"
        fields.check(gate.prompt_length <= context, "walks.gate.prompt_length", gate.prompt_length, rule)
        rule = (
            f"is a jump longer than the context (model.max_seq_len = {context}), which walks.gate.unscorable_rules = "
            "'error' forbids; shorten the jump or lengthen the context"
        )
        for length in rules.lengths(context) if gate.unscorable_rules == "error" else ():
            fields.check(length <= context, rules.source, length, rule)
