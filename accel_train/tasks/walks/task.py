"""Random walks with rules: preflight, and the sufficiency gate on generated continuations.

The scorer that judges the model judges the corpus and the held-out walks too, so what the gate
asks for is known to be reachable before the first step. Three figures stand side by side: greedy
continuations (the gate), continuations sampled at temperature 1, and a random walk that knows
the graph but no rule. A model that meets rules only by accident shows in the last two.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import nn

from accel_train.config.sections import ExperimentConfig
from accel_train.errors import ConfigError, CorpusError
from accel_train.model.generation import generate
from accel_train.process.work import SILENT, StopCheck, WorkContext, never
from accel_train.tasks import drawing
from accel_train.tasks.base import Evaluation, GenerationOptions, Task
from accel_train.tasks.criteria import Criterion, judge
from accel_train.tasks.walks.compliance import Compliance, score, wilson_interval
from accel_train.tasks.walks.config import WalksConfig
from accel_train.tasks.walks.corpus import BLIND, SAMPLED, WalkCorpus, Walks
from accel_train.tasks.walks.dataset import WalkDataset
from accel_train.tasks.walks.generator import random_walks

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SHOWN = 5
"""Walks that ``accel-train generate`` writes by default."""


class WalksTask(Task):
    """Learn to walk a block-model graph and to obey its jumper rules."""

    name = "walks"
    Config = WalksConfig
    headline: ClassVar = {
        "edge_compliance": "edge",
        "rule_compliance": "rule",
        "sampled_rule_compliance": "sampled rule",
    }
    columns: ClassVar = {"EDGE": "final_edge_compliance", "RULE": "final_rule_compliance"}
    curves = ("edge_compliance", "rule_compliance")
    advice: ClassVar = {
        "edge_compliance": "train longer or on more walks",
        "rule_compliance": "train longer or on more walks, or use rotary positions",
    }
    generation_options = frozenset({"num"})

    def __init__(self, config: ExperimentConfig) -> None:
        super().__init__(config)
        self._section: WalksConfig = config.section
        self._gate = self._section.gate
        self._context = config.model.max_seq_len
        self.corpus = WalkCorpus(self._section, self._context, config.seed)

    @property
    def vocab_size(self) -> int:
        """One token per vertex."""
        return self._section.graph.n

    @property
    def criteria(self) -> list[Criterion]:
        """What the gate asks."""
        gate = self._gate
        asked = [
            ("edge_compliance", gate.edge_threshold),
            ("rule_compliance", gate.rule_threshold),
            ("sampled_rule_compliance", gate.sampled_rule_threshold),
            ("rule_lift", gate.rule_lift_threshold),
        ]
        return [Criterion(metric, ">", threshold) for metric, threshold in asked if threshold is not None]

    # -- data ------------------------------------------------------------------------------

    def check(self, work: WorkContext) -> None:
        """Draw graph and rules, and refuse a gate that cannot be passed whatever the model does.

        Raises:
            ConfigError: no such graph or rules, no rule inside the context, a threshold that
                cannot be exceeded, or more rule checks demanded than can occur.
        """
        gate, rules, context = self._gate, self._section.rules, self._context
        for criterion in self.criteria:
            if criterion.threshold >= 1.0:
                field = f"walks.gate.{criterion.metric.removesuffix('_compliance')}_threshold"
                raise ConfigError(field, criterion.threshold, "can never be exceeded; choose a value below 1")
        if not self.corpus.scored_rules:
            rule = (
                f"leaves no jump inside the context (model.max_seq_len = {context}), so the gate could never be "
                "passed; shorten the jumps or lengthen the context"
            )
            raise ConfigError(rules.source, rules.lengths(context), rule)
        jumps = {rule.jump_length for rule in self.corpus.scored_rules}
        deadlines = range(gate.prompt_length, context + 1)
        # At one place of a sequence stands one vertex, so of each length one visit can come due there.
        most = gate.num_sequences * sum(jump <= deadline for jump in jumps for deadline in deadlines)
        if gate.min_rule_checks > most:
            rule = (
                f"can never be met: {gate.num_sequences} sequences of {context + 1} tokens, {gate.prompt_length} of "
                f"them prompt, hold at most {most} rule checks; lower it or raise walks.gate.num_sequences"
            )
            raise ConfigError("walks.gate.min_rule_checks", gate.min_rule_checks, rule)

    def build(self, shared: Path, work: WorkContext) -> str:
        """Build the walks under ``shared``, or verify and reuse them; see :meth:`WalkCorpus.build`."""
        return str(self.corpus.build(shared, work))

    def open(self, artifacts: str) -> WalkDataset:
        """Return the training chunks, memory-mapped; opens the held-out walks as well."""
        self.corpus.open(Path(artifacts))
        return WalkDataset(self.corpus.walks, self._context)

    # -- the gate --------------------------------------------------------------------------

    def preflight(self, work: WorkContext) -> dict[str, Any]:
        """Score the corpus and the held-out walks with the gate's own scorer; call after :meth:`open`.

        Raises:
            CorpusError: a walk breaks a rule or takes an edge that the graph does not have.
        """
        started, gate, rules = time.perf_counter(), self._gate, self.corpus.rules
        corpus = score(self.corpus.walks, self.corpus.graph, rules)
        ceiling = self._score(self.corpus.held_out)
        for name, figures in (("train", corpus), ("held-out", ceiling)):
            if figures.edge_passed < figures.edge_checks or figures.rule_passed < figures.rule_checks:
                raise CorpusError(
                    f"the {name} corpus does not obey its graph: {figures.edge_passed} of {figures.edge_checks} edges "
                    f"and {figures.rule_passed} of {figures.rule_checks} rule visits hold; delete "
                    f"{self.corpus.directory} and run the same command again"
                )
        blind = self._blind
        excluded = [asdict(rule) for rule in rules if rule not in self.corpus.scored_rules]
        enough = ceiling.rule_checks >= gate.min_rule_checks
        warnings = []
        if excluded:
            named = ", ".join(f"{r['vertex']} (jump {r['jump_length']})" for r in excluded)
            warnings.append(f"rules of vertices {named} jump beyond the context and are left out of the score")
        if not enough:
            warnings.append(
                f"about {ceiling.rule_checks} rule checks are expected, fewer than walks.gate.min_rule_checks = "
                f"{gate.min_rule_checks}: the gate would fail as thin evidence; raise walks.gate.num_sequences"
            )
        if blind.rule_compliance is not None and blind.rule_compliance > gate.rule_threshold:
            warnings.append(
                f"a walk that knows no rule already reaches rule compliance {blind.rule_compliance:.3f} > "
                f"walks.gate.rule_threshold = {gate.rule_threshold:g}: passing would prove nothing"
            )
        work.say(
            "preflight",
            f"the corpus obeys all of its {corpus.edge_checks:,} edges and {corpus.rule_checks:,} rule visits "
            f"({time.perf_counter() - started:.1f} s)",
        )
        work.say(
            "preflight",
            f"{len(self.corpus.scored_rules)} of {len(rules)} rules are scored; of about {ceiling.rule_checks:,} rule "
            f"checks a walk that knows no rule passes {_percent(blind.rule_compliance)}",
        )
        asked = " and ".join(f"{c.metric} {c.op} {c.threshold:g}" for c in self.criteria)
        reach = "it can be reached" if enough else "it can be met, but the evidence will be thin"
        work.say("preflight", f"the gate asks {asked}: {reach}")
        for warning in warnings:
            work.say("warning", warning)
        return {
            "reachable": True,
            "rules": {"total": len(rules), "scored": len(self.corpus.scored_rules), "excluded": excluded},
            "corpus": _figures(corpus),
            "ceiling": _figures(ceiling),
            "rule_blind": _figures(blind),
            "warnings": warnings,
        }

    def evaluate(self, model: nn.Module, losses: Mapping[str, float], work: WorkContext) -> Evaluation:
        """Continue the held-out prompts greedily and by sampling, score both, judge the criteria.

        Raises:
            Interrupted: ``should_stop()`` turned true.
        """
        gate = self._gate
        continued = self._continue(model, 0.0, work.should_stop)
        greedy = self._score(continued)
        sampled = self._score(self._continue(model, 1.0, work.should_stop))
        blind = self._blind
        metrics: dict[str, float | None] = {
            "edge_compliance": greedy.edge_compliance,
            "rule_compliance": greedy.rule_compliance,
            "sampled_edge_compliance": sampled.edge_compliance,
            "sampled_rule_compliance": sampled.rule_compliance,
            "rule_blind_compliance": blind.rule_compliance,
            "rule_lift": _difference(greedy.rule_compliance, blind.rule_compliance),
        }
        counts = zip(self.corpus.scored_rules, greedy.checks_per_rule, greedy.passed_per_rule, strict=True)
        evidence = {
            **_figures(greedy),
            "distinct_transitions": self._distinct_transitions(continued),
            "rules": [{**asdict(rule), "checks": int(met), "passed": int(kept)} for rule, met, kept in counts],
            "sampled": _figures(sampled),
            "rule_blind": _figures(blind),
        }
        few = f"too few rule checks: {greedy.rule_checks}, walks.gate.min_rule_checks is {gate.min_rule_checks}"
        thin = [few] if greedy.rule_checks < gate.min_rule_checks else []
        return Evaluation(judge(self.criteria, metrics, evidence=evidence, too_thin=thin))

    # -- the record and the model in use ---------------------------------------------------

    def draw(self, axes: Axes, record: Mapping[str, Any]) -> None:
        """Draw greedy edge and rule compliance over the evaluations, with the thresholds.

        Args:
            axes: where to draw.
            record: of a run of the walks task; curves may be short or empty.
        """
        gate = record["config"]["walks"]["gate"]
        unit = drawing.evaluations(record)
        axes.set(title="Greedy compliance", xlabel=unit, ylabel="share of checks passed", ylim=(-0.02, 1.05))
        count, lowest = 0, 1.0
        for label, color, marker in (("edge", drawing.BLUE, "o"), ("rule", drawing.ORANGE, "s")):
            values = drawing.numbers(record["curves"][f"{label}_compliance"])
            threshold = gate[f"{label}_threshold"]
            axes.axhline(threshold, color=color, linestyle="--", linewidth=1.1, alpha=0.8)
            name, transform = f"{label} > {threshold:g}", axes.get_yaxis_transform()
            # Outside the axes, where no curve passes.
            axes.text(1.01, threshold, name, transform=transform, va="center", fontsize=8, color=color)
            if values:
                drawing.curve(axes, values, color, marker, f"{label} compliance")
            count = max(count, len(values))
            lowest = min([lowest, *(value for value in values if not math.isnan(value))])
        drawing.finish(axes, count)
        if count and record["gate"]["passed"] and unit == "epoch":
            axes.axvline(record["gate"]["epoch"], color=drawing.GREY, linestyle=":", linewidth=1.2, label="gate passed")
        if count:
            # Where the lines leave room: they rise, so below them on the right unless they start high.
            axes.legend(loc="lower right" if lowest < 0.9 else "lower left", framealpha=1.0, edgecolor="none")

    def prepare_generation(self, checkpoint: Path, shared: Path) -> None:
        """Open the held-out walks, whose beginnings are the prompts."""
        self.check(SILENT)
        self.open(self.build(shared, SILENT))

    def generate(self, model: nn.Module, options: GenerationOptions) -> Iterator[str]:
        """Yield greedy continuations of held-out prompts, a line of context length + 1 vertices each.

        Raises:
            ConfigError: there are fewer prompts.
        """
        num = options.num or _SHOWN
        if num > len(self.corpus.held_out):
            prompts = len(self.corpus.held_out)
            rule = f"is more than the {prompts} held-out prompts of this run (walks.gate.num_sequences)"
            raise ConfigError("--num", num, rule)
        for walk in self._continue(model, 0.0, never, num):
            yield " ".join(map(str, walk.tolist())) + "\n"

    def _continue(self, model: nn.Module, temperature: float, should_stop: StopCheck, num: int | None = None) -> Walks:
        device = next(model.parameters()).device
        prompts = torch.from_numpy(self.corpus.held_out[:num, : self._gate.prompt_length].astype(np.int64)).to(device)
        tokens = generate(
            model,
            prompts,
            self._context + 1,
            temperature=temperature,
            generator=torch.Generator(device=device).manual_seed(self.corpus.stream_seed(SAMPLED)),
            should_stop=should_stop,
        )
        return tokens.cpu().numpy()

    def _score(self, walks: Walks) -> Compliance:
        return score(walks, self.corpus.graph, self.corpus.scored_rules, start=self._gate.prompt_length)

    def _distinct_transitions(self, walks: Walks) -> int:
        """Different steps among the scored ones: few of them betray a model that runs in a circle."""
        scored = walks[:, self._gate.prompt_length - 1 :].astype(np.int64)
        return int(np.unique(scored[:, :-1] * self.vocab_size + scored[:, 1:]).size)

    @cached_property
    def _blind(self) -> Compliance:
        """A uniform random walk from the same prompts: what compliance comes by accident."""
        prompts = self.corpus.held_out[:, : self._gate.prompt_length]
        return self._score(random_walks(self.corpus.graph, prompts, self._context + 1, self.corpus.stream_seed(BLIND)))


def _figures(compliance: Compliance) -> dict[str, Any]:
    """Counts, compliances and 95 % Wilson intervals as JSON values."""
    return {
        "edge_checks": compliance.edge_checks,
        "edge_compliance": compliance.edge_compliance,
        "edge_interval": list(wilson_interval(compliance.edge_passed, compliance.edge_checks)),
        "rule_checks": compliance.rule_checks,
        "rule_compliance": compliance.rule_compliance,
        "rule_interval": list(wilson_interval(compliance.rule_passed, compliance.rule_checks)),
        "distinct_sequences": compliance.distinct_sequences,
    }


def _difference(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _percent(value: float | None) -> str:
    return "none" if value is None else f"{100 * value:.4g} %"
