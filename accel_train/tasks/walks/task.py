"""Random walks with rules: corpus, preflight, and the sufficiency gate on generated continuations.

The scorer that judges the model judges the corpus and the held-out walks too, so what the gate
asks for is known to be reachable before the first step. Three figures stand side by side: greedy
continuations (the gate), continuations sampled at temperature 1, and a random walk that knows
the graph but no rule. A model that meets rules only by accident shows in the last two.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse import save_npz
from torch import nn

from accel_train.config.sections import ExperimentConfig, canonical_json, result_values
from accel_train.data.windows import WalkDataset
from accel_train.errors import ConfigError, CorpusError
from accel_train.files.shared import cached
from accel_train.model.generation import generate
from accel_train.process.console import Meter
from accel_train.process.fault_points import SILENT, Observer
from accel_train.tasks.base import Evaluation, Say, StopCheck, Trained
from accel_train.tasks.criteria import Criterion, judge
from accel_train.tasks.walks.compliance import Compliance, scorable_rules, score, wilson_interval
from accel_train.tasks.walks.generator import generate_walks, random_walks
from accel_train.tasks.walks.graph import Graph, generate_graph
from accel_train.tasks.walks.rules import Rule, designate_rules

# Part of the cache key: raise it when the same configuration would give other walks.
_CORPUS_VERSION = 1
_GRAPH, _RULES, _TRAIN, _HELD_OUT, _BLIND, _SAMPLED = range(6)


class WalksTask:
    """Learn to walk a block-model graph and to obey its jumper rules."""

    def __init__(self, config: ExperimentConfig, observer: Observer = SILENT) -> None:
        self.config = config
        self._observer = observer
        self._context = config.model.max_seq_len
        self._directory = Path()
        self._graph: Graph | None = None
        self._graph_seconds = 0.0
        self._rules: tuple[Rule, ...] = ()
        self._held_out: np.ndarray[Any, Any] = np.empty((0, 0), np.uint16)
        self._walks: np.ndarray[Any, Any] = np.empty((0, 0), np.uint16)
        self._blind: Compliance | None = None

    @property
    def vocab_size(self) -> int:
        """One token per vertex."""
        return self.config.graph.n

    @property
    def graph(self) -> Graph:
        """The graph; drawn at first use (a pure function of the configuration)."""
        if self._graph is None:
            started = time.perf_counter()
            self._graph = generate_graph(self.config.graph, self._stream_seed(_GRAPH))
            self._rules = designate_rules(self._graph, self.config.rules, self._context, self._stream_seed(_RULES))
            self._graph_seconds = time.perf_counter() - started
        return self._graph

    @property
    def rules(self) -> tuple[Rule, ...]:
        """All rules of the graph."""
        _ = self.graph
        return self._rules

    @property
    def scored_rules(self) -> tuple[Rule, ...]:
        """The rules whose jump is visible inside the context."""
        return scorable_rules(self.rules, self._context)[0]

    @property
    def criteria(self) -> list[Criterion]:
        """What the gate asks."""
        gate = self.config.gate
        asked = [
            ("edge_compliance", gate.edge_threshold),
            ("rule_compliance", gate.rule_threshold),
            ("sampled_rule_compliance", gate.sampled_rule_threshold),
            ("rule_lift", gate.rule_lift_threshold),
        ]
        return [Criterion(metric, ">", threshold) for metric, threshold in asked if threshold is not None]

    def check(self, say: Say, should_stop: StopCheck) -> None:
        """Draw graph and rules, and refuse a gate that cannot be passed whatever the model does.

        Raises:
            ConfigError: no such graph or rules, no rule inside the context, a threshold that
                cannot be exceeded, or more rule checks demanded than can occur.
        """
        gate, context = self.config.gate, self._context
        for criterion in self.criteria:
            if criterion.threshold >= 1.0:
                name = criterion.metric.removesuffix("_compliance")
                raise ConfigError(
                    f"gate.{name}_threshold", criterion.threshold, "can never be exceeded; choose a value below 1"
                )
        field = "rules.jump_scales" if self.config.rules.jump_lengths is None else "rules.jump_lengths"
        if not self.scored_rules:
            raise ConfigError(
                field,
                self.config.rules.lengths(context),
                f"leaves no jump inside the context (model.max_seq_len = {context}), so the gate could "
                "never be passed; shorten the jumps or lengthen the context",
            )
        jumps = {rule.jump_length for rule in self.scored_rules}
        deadlines = range(gate.prompt_length, context + 1)
        # At one place of a sequence stands one vertex, so of each length one visit can come due there.
        most = gate.num_sequences * sum(jump <= deadline for jump in jumps for deadline in deadlines)
        if gate.min_rule_checks > most:
            raise ConfigError(
                "gate.min_rule_checks",
                gate.min_rule_checks,
                f"can never be met: {gate.num_sequences} sequences of {context + 1} tokens, {gate.prompt_length} of "
                f"them prompt, hold at most {most} rule checks; lower it or raise gate.num_sequences",
            )

    # -- data ------------------------------------------------------------------------------

    def corpus_key(self) -> str:
        """Hash of everything that defines the corpus."""
        config = self.config
        defines = {
            "version": _CORPUS_VERSION,
            "seed": config.seed,
            "graph": dict(result_values(config.graph)),
            "jumpers_per_block": config.rules.jumpers_per_block,
            "jump_lengths": list(config.rules.lengths(self._context)),
            "walks": dict(result_values(config.walks)),
            "held_out": [config.gate.num_sequences, self._context + 1],
        }
        return hashlib.sha256(canonical_json(defines).encode()).hexdigest()[:16]

    def build(self, shared: Path, say: Say, should_stop: StopCheck) -> str:
        """Build the corpora under ``shared``, or verify and reuse them.

        Raises:
            Interrupted: ``should_stop()`` turned true; nothing half-built is left.
        """
        graph, config = self.graph, self.config
        say(
            "graph",
            f"{graph.n} vertices in {graph.num_blocks} blocks, {graph.adjacency.nnz:,} edges, {len(self.rules)} rules "
            f"({self._graph_seconds:.1f} s)",
        )
        built = False

        def build_into(directory: Path) -> None:
            nonlocal built
            built = True
            self._build_corpora(directory, say, should_stop)

        started = time.perf_counter()
        directory = cached(
            shared,
            f"walks-{self.corpus_key()}",
            build_into,
            on_wait=lambda message: say("corpus", message),
            should_stop=should_stop,
            observer=self._observer,
        )
        verb = "built" if built else "found and verified"
        say(
            "corpus",
            f"{config.walks.num_walks:,} walks of {config.walks.walk_length} {verb} as "
            f"{directory.parent.name}/{directory.name} ({time.perf_counter() - started:.1f} s)",
        )
        return str(directory)

    def _build_corpora(self, directory: Path, say: Say, should_stop: StopCheck) -> None:
        walks, gate = self.config.walks, self.config.gate
        for name, stream, count, length in (
            ("train", _TRAIN, walks.num_walks, walks.walk_length),
            ("held_out", _HELD_OUT, gate.num_sequences, self._context + 1),
        ):
            with Meter(f"{name} walks", count, lambda line: say("corpus", line), unit="") as meter:
                result = generate_walks(
                    self.graph,
                    self.rules,
                    count,
                    length,
                    self._stream_seed(stream),
                    should_stop=should_stop,
                    progress=meter.reach,
                )
            np.save(directory / f"{name}.npy", result.walks)
        save_npz(directory / "graph.npz", self.graph.adjacency)
        np.save(directory / "blocks.npy", self.graph.block_assignments)
        rules = [asdict(rule) for rule in self.rules]
        (directory / "rules.json").write_text(json.dumps(rules, indent=1) + "\n", encoding="utf-8")

    def _stream_seed(self, stream: int) -> int:
        """Independent seeds for the graph, the rules, the corpora and everything the gate draws."""
        return int(np.random.SeedSequence([self.config.seed, stream]).generate_state(1, np.uint64)[0] >> 1)

    def open(self, artifacts: str) -> WalkDataset:
        """The training chunks, memory-mapped; also opens the held-out walks for :meth:`evaluate`."""
        self._directory = Path(artifacts)
        self._walks = self._load("train.npy")
        self._held_out = self._load("held_out.npy")
        return WalkDataset(self._walks, self._context)

    def _load(self, name: str) -> np.ndarray[Any, Any]:
        path = self._directory / name
        try:
            walks: np.ndarray[Any, Any] = np.load(path, mmap_mode="r", allow_pickle=False)
        except ValueError as error:
            # The digests hold, so nobody but who wrote it can have put this there.
            raise CorpusError(f"{path} is no array of numbers: not loaded, not run ({error})") from error
        return walks

    # -- the gate --------------------------------------------------------------------------

    def preflight(self, say: Say) -> dict[str, Any]:
        """Score the corpus and the held-out walks with the gate's own scorer; call after :meth:`open`.

        Raises:
            CorpusError: a walk breaks a rule or takes an edge that the graph does not have.
        """
        started, gate = time.perf_counter(), self.config.gate
        corpus = score(self._walks, self.graph, self.rules)
        ceiling = self._score(self._held_out)
        for name, figures in (("train", corpus), ("held-out", ceiling)):
            if figures.edge_passed < figures.edge_checks or figures.rule_passed < figures.rule_checks:
                raise CorpusError(
                    f"the {name} corpus does not obey its graph: {figures.edge_passed} of {figures.edge_checks} edges "
                    f"and {figures.rule_passed} of {figures.rule_checks} rule visits hold; delete "
                    f"{self._directory} and run the same command again"
                )
        blind = self._blind_compliance()
        excluded = [asdict(rule) for rule in self.rules if rule not in self.scored_rules]
        enough = ceiling.rule_checks >= gate.min_rule_checks
        warnings = []
        if excluded:
            named = ", ".join(f"{r['vertex']} (jump {r['jump_length']})" for r in excluded)
            warnings.append(f"rules of vertices {named} jump beyond the context and are left out of the score")
        if not enough:
            warnings.append(
                f"about {ceiling.rule_checks} rule checks are expected, fewer than gate.min_rule_checks = "
                f"{gate.min_rule_checks}: the gate would fail as thin evidence; raise gate.num_sequences"
            )
        if blind.rule_compliance is not None and blind.rule_compliance > gate.rule_threshold:
            warnings.append(
                f"a walk that knows no rule already reaches rule compliance {blind.rule_compliance:.3f} > "
                f"gate.rule_threshold = {gate.rule_threshold:g}: passing would prove nothing"
            )
        say(
            "preflight",
            f"the corpus obeys all of its {corpus.edge_checks:,} edges and {corpus.rule_checks:,} rule visits "
            f"({time.perf_counter() - started:.1f} s)",
        )
        say(
            "preflight",
            f"{len(self.scored_rules)} of {len(self.rules)} rules are scored; of about {ceiling.rule_checks:,} rule "
            f"checks a walk that knows no rule passes {_percent(blind.rule_compliance)}",
        )
        asked = " and ".join(f"{c.metric} {c.op} {c.threshold:g}" for c in self.criteria)
        reach = "it can be reached" if enough else "it can be met, but the evidence will be thin"
        say("preflight", f"the gate asks {asked}: {reach}")
        for warning in warnings:
            say("warning", warning)
        return {
            "reachable": True,
            "rules": {"total": len(self.rules), "scored": len(self.scored_rules), "excluded": excluded},
            "corpus": _figures(corpus),
            "ceiling": _figures(ceiling),
            "rule_blind": _figures(blind),
            "warnings": warnings,
        }

    def validation(self) -> dict[str, Any]:
        """None: the gate looks at behaviour, not at losses."""
        return {}

    def digests(self) -> dict[str, str]:
        """None: the corpus is a function of the configuration, which is compared."""
        return {}

    def files(self) -> dict[str, bytes]:
        """None."""
        return {}

    def conclude(self, trained: Trained, should_stop: StopCheck) -> Evaluation | None:
        """The last evaluation stands."""
        return None

    def evaluate(self, model: nn.Module, losses: Mapping[str, float], should_stop: StopCheck) -> Evaluation:
        """Continue the held-out prompts greedily and by sampling, score both, judge the criteria.

        Raises:
            Interrupted: ``should_stop()`` turned true.
        """
        gate = self.config.gate
        continued = self._continue(model, 0.0, should_stop)
        greedy = self._score(continued)
        sampled = self._score(self._continue(model, 1.0, should_stop))
        blind = self._blind_compliance()
        metrics: dict[str, float | None] = {
            "edge_compliance": greedy.edge_compliance,
            "rule_compliance": greedy.rule_compliance,
            "sampled_edge_compliance": sampled.edge_compliance,
            "sampled_rule_compliance": sampled.rule_compliance,
            "rule_blind_compliance": blind.rule_compliance,
            "rule_lift": _difference(greedy.rule_compliance, blind.rule_compliance),
        }
        thin = []
        if greedy.rule_checks < gate.min_rule_checks:
            thin.append(f"too few rule checks: {greedy.rule_checks}, gate.min_rule_checks is {gate.min_rule_checks}")
        verdict = judge(
            self.criteria,
            metrics,
            evidence={
                **_figures(greedy),
                "distinct_transitions": self._distinct_transitions(continued),
                "rules": [
                    {**asdict(rule), "checks": int(checks), "passed": int(passed)}
                    for rule, checks, passed in zip(
                        self.scored_rules, greedy.checks_per_rule, greedy.passed_per_rule, strict=True
                    )
                ],
                "sampled": _figures(sampled),
                "rule_blind": _figures(blind),
            },
            too_thin=thin,
        )
        return Evaluation(verdict)

    def generate(self, model: nn.Module, num: int, temperature: float) -> list[list[int]]:
        """``num`` continuations of held-out prompts, each of context length + 1 vertices.

        Raises:
            ConfigError: there are fewer prompts.
        """
        if num > len(self._held_out):
            rule = f"is more than the {len(self._held_out)} held-out prompts of this run (gate.num_sequences)"
            raise ConfigError("--num", num, rule)
        tokens = self._continue(model, temperature, lambda: False, num)
        return [[int(vertex) for vertex in row] for row in tokens]

    def _continue(
        self, model: nn.Module, temperature: float, should_stop: StopCheck, num: int | None = None
    ) -> np.ndarray[Any, Any]:
        device = next(model.parameters()).device
        prompts = torch.from_numpy(self._held_out[:num, : self.config.gate.prompt_length].astype(np.int64)).to(device)
        generator = torch.Generator(device=device).manual_seed(self._stream_seed(_SAMPLED))
        tokens = generate(
            model,
            prompts,
            self._context + 1,
            temperature=temperature,
            generator=generator,
            should_stop=should_stop,
        )
        return tokens.cpu().numpy()

    def _score(self, walks: np.ndarray[Any, Any]) -> Compliance:
        return score(walks, self.graph, self.scored_rules, start=self.config.gate.prompt_length)

    def _distinct_transitions(self, walks: np.ndarray[Any, Any]) -> int:
        """Different steps among the scored ones: few of them betray a model that runs in a circle."""
        scored = walks[:, self.config.gate.prompt_length - 1 :].astype(np.int64)
        return int(np.unique(scored[:, :-1] * self.vocab_size + scored[:, 1:]).size)

    def _blind_compliance(self) -> Compliance:
        """A uniform random walk from the same prompts: what compliance comes by accident."""
        if self._blind is None:
            prompts = self._held_out[:, : self.config.gate.prompt_length]
            self._blind = self._score(random_walks(self.graph, prompts, self._context + 1, self._stream_seed(_BLIND)))
        return self._blind


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
