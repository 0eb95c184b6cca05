import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accel_train.tasks.walks import compliance
from accel_train.tasks.walks.compliance import score, wilson_interval
from accel_train.tasks.walks.config import GraphConfig, RulesConfig
from accel_train.tasks.walks.generator import generate_walks
from accel_train.tasks.walks.graph import Rule, designate_rules, generate_graph

GRAPH = generate_graph(GraphConfig(n=12, K=3, p_in=0.6, p_out=0.4, degree_exponent=0.5, max_attempts=100), seed=0)
RULES = designate_rules(GRAPH, RulesConfig(jump_lengths=(2, 3, 5)), 64, seed=0)

any_rules = st.lists(st.builds(Rule, st.integers(0, 11), st.integers(0, 2), st.integers(1, 9)), max_size=6).map(tuple)


def reference(walks, graph, rules, start):
    """The same counts, slowly: one walk, one step, one rule at a time."""
    edges = {(int(u), int(v)) for u, v in zip(*graph.adjacency.nonzero(), strict=True)}
    edge_checks = edge_passed = 0
    checks, passed = [0] * len(rules), [0] * len(rules)
    for walk in walks.tolist():
        for t in range(start, len(walk)):
            edge_checks += 1
            edge_passed += (walk[t - 1], walk[t]) in edges
        for i, rule in enumerate(rules):
            for t, token in enumerate(walk):
                deadline = t + rule.jump_length
                if token == rule.vertex and start <= deadline < len(walk):
                    end = walk[deadline]
                    checks[i] += 1
                    passed[i] += 0 <= end < graph.n and graph.block_assignments[end] == rule.target_block
    distinct = len({tuple(walk) for walk in walks.tolist()})
    return edge_checks, edge_passed, checks, passed, distinct


@st.composite
def scored_walks(draw):
    num, length = draw(st.integers(0, 9)), draw(st.integers(1, 14))
    dtype = draw(st.sampled_from([np.int8, np.int32, np.int64]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    low, high = draw(st.sampled_from([(0, 12), (0, 4), (-3, 15)]))
    return rng.integers(low, high, size=(num, length)).astype(dtype), draw(st.integers(1, length + 1))


@pytest.mark.parametrize("dense_vertices", [0, 8192], ids=["sparse look-up", "dense look-up"])
@settings(max_examples=150, deadline=None)
@given(data=scored_walks(), rules=any_rules, chunk_tokens=st.sampled_from([1, 30, 1 << 20]))
def test_the_counts_are_those_of_a_slow_scorer(dense_vertices, data, rules, chunk_tokens):
    walks, start = data
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compliance, "CHUNK_TOKENS", chunk_tokens)
        patch.setattr(compliance, "DENSE_VERTICES", dense_vertices)
        got = score(walks, GRAPH, rules, start=start)
    checks, passed = got.checks_per_rule.tolist(), got.passed_per_rule.tolist()
    counts = (got.edge_checks, got.edge_passed, checks, passed, got.distinct_sequences)
    assert counts == reference(walks, GRAPH, rules, start)
    assert (got.rule_checks, got.rule_passed) == (sum(checks), sum(passed))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32), start=st.integers(1, 20))
def test_the_counts_are_those_of_a_slow_scorer_on_valid_walks(seed, start):
    walks = generate_walks(GRAPH, RULES, 20, 20, seed).walks
    got = score(walks, GRAPH, RULES, start=start)
    checks, passed = got.checks_per_rule.tolist(), got.passed_per_rule.tolist()
    assert (got.edge_checks, got.edge_passed, checks, passed, got.distinct_sequences) == reference(
        walks, GRAPH, RULES, start
    )


def test_one_planted_wrong_edge_is_caught():
    walks = generate_walks(GRAPH, (), 50, 20, seed=1).walks
    walks[7, -1] = walks[7, -2]  # there are no self-loops
    got = score(walks, GRAPH, RULES)
    assert got.edge_checks - got.edge_passed == 1


def test_one_planted_broken_rule_is_caught():
    rule = RULES[0]
    walks = generate_walks(GRAPH, RULES, 50, 20, seed=1).walks
    walk, step = np.argwhere(walks[:, : -rule.jump_length] == rule.vertex)[-1]
    elsewhere = np.flatnonzero(GRAPH.block_assignments != rule.target_block)
    quiet = np.setdiff1d(elsewhere, [r.vertex for r in RULES])[0]
    walks[walk, step + rule.jump_length] = quiet
    got = score(walks, GRAPH, RULES[:1])
    assert got.rule_checks - got.rule_passed == 1
    assert got.rule_compliance < 1.0


def test_a_rule_met_in_the_prompt_counts_when_its_deadline_is_generated():
    rule = Rule(vertex=0, target_block=2, jump_length=3)
    walk = np.array([[0, 1, 2, 11]])
    assert score(walk, GRAPH, (rule,), start=3).rule_checks == 1
    assert score(walk, GRAPH, (rule,), start=4).rule_checks == 0


def test_compliance_without_checks_is_none():
    got = score(np.array([[0, 1]]), GRAPH, (), start=2)
    assert got.edge_compliance is None
    assert got.rule_compliance is None


def test_compliance_is_the_share_of_passes():
    got = score(np.array([[0, 0, 99, -1]]), GRAPH, (Rule(0, 0, 1),))
    assert got.edge_compliance == 0.0
    assert got.rule_compliance == 0.5


def test_a_start_before_the_first_transition_is_refused():
    with pytest.raises(ValueError, match="start must be at least 1"):
        score(np.array([[0, 1]]), GRAPH, (), start=0)


@given(st.integers(1, 10_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_wilson_bounds_are_z_standard_errors_from_the_share(counts):
    passed, checks = counts
    share = passed / checks
    low, high = wilson_interval(passed, checks)
    assert 0.0 <= low <= share + 1e-12
    assert share - 1e-12 <= high <= 1.0
    for bound in (low, high):
        assert abs(share - bound) == pytest.approx(1.96 * math.sqrt(bound * (1 - bound) / checks), abs=1e-6)


def test_the_wilson_interval_of_eight_in_ten():
    assert wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)


def test_the_wilson_interval_without_checks_is_everything():
    assert wilson_interval(0, 0) == (0.0, 1.0)
