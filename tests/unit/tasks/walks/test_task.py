"""The walk task: samples, preflight, gate, what it writes."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from accel_train.config.fields import from_dict
from accel_train.errors import ConfigError, CorpusError, Interrupted
from accel_train.process.work import SILENT, WorkContext
from accel_train.tasks.base import GenerationOptions
from accel_train.tasks.registry import config_class
from accel_train.tasks.walks.task import WalksTask
from accel_train.training.trainer import Trainer

WALKS: dict[str, Any] = {
    "graph": {"n": 40, "K": 4, "p_in": 0.5, "p_out": 0.15},
    "rules": {"jumpers_per_block": 1, "jump_lengths": [3, 4, 5]},
    "gate": {"num_sequences": 200, "prompt_length": 4},
}
COMMON: dict[str, Any] = {
    "model": {"d_model": 16, "n_layers": 1, "n_heads": 2, "max_seq_len": 16},
    "training": {"batch_size": 32},
}


def config(**sections: dict[str, Any]) -> Any:
    """The base with changes to the sections of the task and to the common ones."""
    own = {name: {**WALKS[name], **sections.get(name, {})} for name in WALKS}
    walks = {"num_walks": 600, "walk_length": 34, **sections.get("walks", {}), **own}
    common = {name: {**COMMON[name], **sections.get(name, {})} for name in COMMON}
    return from_dict({"walks": walks, **common}, config_class("walks"))


def opened(tmp_path, **sections) -> tuple[WalksTask, Any]:
    task = WalksTask(config(**sections))
    task.check(SILENT)
    return task, task.open(task.build(tmp_path, SILENT))


class Oracle(nn.Module):
    """Replays walks that it knows: logits point at the next vertex of the walk with the same prompt."""

    def __init__(self, walks: np.ndarray, n: int) -> None:
        super().__init__()
        self.walks, self.n = torch.from_numpy(walks.astype(np.int64)), n
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        batch, time = tokens.shape
        logits = torch.zeros(batch, time, self.n)
        for row in range(batch):
            match = (self.walks[:, :4] == tokens[row, :4]).all(1).nonzero()[0, 0]
            logits[row, -1, self.walks[match, time]] = 50.0
        return logits


class Bigram(nn.Module):
    """Knows which vertex follows which, and nothing of rules."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.next = nn.Embedding(n, n)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.next(tokens)


def test_the_samples_are_chunks_of_the_walks(tmp_path):
    task, dataset = opened(tmp_path)
    assert len(dataset) == 600 * (34 // 17)
    inputs, targets = dataset[1]
    assert inputs.tolist() == task.corpus.walks[0, 17:33].tolist()
    assert targets.tolist() == task.corpus.walks[0, 18:34].tolist()


def test_the_preflight_says_what_the_gate_can_reach(tmp_path):
    task, _ = opened(tmp_path)
    said = []
    found = task.preflight(WorkContext(lambda phase, what: said.append(f"{phase}: {what}")))
    assert found["reachable"]
    assert found["ceiling"]["edge_compliance"] == found["ceiling"]["rule_compliance"] == 1.0
    assert 0 < found["rule_blind"]["rule_compliance"] < 0.8
    assert found["warnings"] == []
    assert any("it can be reached" in line for line in said)
    json.dumps(found)


def test_rules_beyond_the_context_are_named_and_left_out(tmp_path):
    task, _ = opened(tmp_path, rules={"jump_lengths": [3, 4, 5, 20]})
    found = task.preflight(SILENT)
    excluded = found["rules"]["excluded"]
    assert [rule["jump_length"] for rule in excluded] == [20]
    assert str(excluded[0]["vertex"]) in found["warnings"][0]
    assert len(task.corpus.scored_rules) == 3


def test_thin_evidence_is_expected_aloud(tmp_path):
    task, _ = opened(tmp_path, gate={"num_sequences": 10})
    said = []
    found = task.preflight(WorkContext(lambda phase, what: said.append(what)))
    assert "thin evidence" in found["warnings"][0]
    assert not any("it can be reached" in line for line in said)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"rules": {"jump_lengths": [17, 30]}}, r"walks\.rules\.jump_lengths: .*no jump inside the context"),
        ({"gate": {"edge_threshold": 1.0}}, r"walks\.gate\.edge_threshold: 1\.0 can never be exceeded"),
        ({"gate": {"sampled_rule_threshold": 1.0}}, r"walks\.gate\.sampled_rule_threshold: 1\.0 can never"),
        ({"gate": {"rule_lift_threshold": 1.0}}, r"walks\.gate\.rule_lift_threshold: 1\.0 can never"),
        ({"gate": {"min_rule_checks": 10**6}}, r"walks\.gate\.min_rule_checks: 1000000 can never be met"),
        ({"gate": {"prompt_length": 16, "num_sequences": 40, "min_rule_checks": 300}}, r"hold at most 120 rule checks"),
        (
            {"graph": {"p_in": 0.001, "p_out": 0.001}},
            r"walks\.graph\.p_in: .*raise walks\.graph\.p_in or walks\.graph\.p_out",
        ),
    ],
)
def test_a_gate_that_cannot_be_passed_is_refused_with_the_reason(sections, message):
    with pytest.raises(ConfigError, match=message):
        WalksTask(config(**sections)).check(SILENT)


def test_a_planted_violation_in_the_corpus_is_refused(tmp_path):
    task, _ = opened(tmp_path)
    walks = np.array(task.corpus.walks)
    allowed = set(task.corpus.graph.adjacency[[int(walks[5, 8])], :].indices.tolist())
    walks[5, 9] = next(v for v in range(task.corpus.graph.n) if v not in allowed)
    task.corpus.walks = walks
    with pytest.raises(CorpusError, match="the train corpus does not obey its graph"):
        task.preflight(SILENT)


def test_a_model_that_knows_the_rules_passes(tmp_path):
    task, _ = opened(tmp_path)
    verdict = task.evaluate(Oracle(np.asarray(task.corpus.held_out), task.corpus.graph.n), {}, SILENT).verdict
    assert verdict.passed
    assert verdict.metrics["edge_compliance"] == verdict.metrics["rule_compliance"] == 1.0
    evidence = verdict.evidence
    assert evidence["edge_checks"] == 200 * 13
    assert evidence["rule_checks"] >= 100
    assert evidence["rule_interval"][0] < 1.0 <= evidence["rule_interval"][1] + 1e-9
    assert evidence["distinct_sequences"] == 200
    assert 100 < evidence["distinct_transitions"] <= task.corpus.graph.adjacency.nnz
    json.dumps(verdict.to_dict())


def test_the_same_figures_on_thin_evidence_do_not_pass(tmp_path):
    task, _ = opened(tmp_path, gate={"min_rule_checks": 2000})
    verdict = task.evaluate(Oracle(np.asarray(task.corpus.held_out), task.corpus.graph.n), {}, SILENT).verdict
    assert not verdict.passed
    assert "too few rule checks" in verdict.failure_reason


def test_the_record_exposes_a_rule_blind_bigram_model(tmp_path):
    """It walks the graph without a mistake; beside the rule-blind walk its rule figures are seen to be accident."""
    task, dataset = opened(
        tmp_path,
        walks={"num_walks": 2000},
        gate={"rule_lift_threshold": 0.3, "sampled_rule_threshold": 0.6},
        training={"batch_size": 32, "max_epochs": 12, "learning_rate": 0.1},
    )
    model = Bigram(task.corpus.graph.n)
    Trainer(model, dataset, task.config.training).fit()
    verdict = task.evaluate(model, {}, SILENT).verdict
    metrics, blind = verdict.metrics, verdict.metrics["rule_blind_compliance"]
    assert metrics["edge_compliance"] > 0.95, "the bigram model should know the edges"
    assert abs(metrics["sampled_rule_compliance"] - blind) < 0.15, "sampling shows it to be rule-blind"
    assert not verdict.passed
    failed = {row["metric"] for row in verdict.criteria if not row["passed"]}
    assert "sampled_rule_compliance" in failed
    assert verdict.evidence["rule_blind"]["rule_compliance"] == blind
    assert verdict.evidence["sampled"]["rule_checks"] > 100


class TwoCycle(nn.Module):
    """Walks to and fro between two vertices, whatever it is shown."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n, self.unused = n, nn.Parameter(torch.zeros(1))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return nn.functional.one_hot((tokens + 1) % 2, self.n).float()


def test_a_model_that_runs_in_a_circle_shows_in_the_evidence(tmp_path):
    task, _ = opened(tmp_path)
    evidence = task.evaluate(TwoCycle(task.corpus.graph.n), {}, SILENT).verdict.evidence
    assert evidence["distinct_sequences"] > 100, "the prompts differ, so the sequences do"
    assert evidence["distinct_transitions"] < 100


def test_walks_are_written_a_line_each(tmp_path):
    task, _ = opened(tmp_path)
    oracle = Oracle(np.asarray(task.corpus.held_out), task.corpus.graph.n)
    lines = list(task.generate(oracle, GenerationOptions(num=3)))
    assert lines == [" ".join(map(str, walk)) + "\n" for walk in task.corpus.held_out[:3].tolist()]


def test_five_walks_are_written_by_default(tmp_path):
    task, _ = opened(tmp_path)
    assert len(list(task.generate(Bigram(task.corpus.graph.n), GenerationOptions()))) == 5


def test_more_walks_than_prompts_are_refused(tmp_path):
    task, _ = opened(tmp_path)
    with pytest.raises(ConfigError, match="--num: 201 is more than the 200 held-out prompts"):
        list(task.generate(Bigram(task.corpus.graph.n), GenerationOptions(num=201)))


@pytest.mark.parametrize("stops", [True, False])
def test_the_gate_of_the_section_says_whether_training_stops(stops):
    assert WalksTask(config(gate={"stop_on_pass": stops})).stops_on_pass is stops


def test_the_evaluation_can_be_interrupted_and_leaves_the_global_rng(tmp_path):
    task, _ = opened(tmp_path)
    model = Bigram(task.corpus.graph.n)
    with pytest.raises(Interrupted):
        task.evaluate(model, {}, WorkContext(should_stop=lambda: True))
    before = torch.get_rng_state()
    first = task.evaluate(model, {}, SILENT)
    assert torch.equal(torch.get_rng_state(), before)
    assert task.evaluate(model, {}, SILENT) == first
