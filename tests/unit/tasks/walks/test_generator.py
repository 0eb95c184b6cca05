from concurrent.futures import ThreadPoolExecutor
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from accel_train.errors import ConfigError, Interrupted
from accel_train.tasks.walks import generator
from accel_train.tasks.walks.compliance import score
from accel_train.tasks.walks.config import GraphConfig, RulesConfig
from accel_train.tasks.walks.generator import generate_walks, random_walks
from accel_train.tasks.walks.graph import Rule, designate_rules, generate_graph

GRAPH = generate_graph(GraphConfig(n=24, K=3, p_in=0.6, p_out=0.3, max_attempts=100), seed=0)
RULES = designate_rules(GRAPH, RulesConfig(jump_lengths=(2, 3, 7)), 64, seed=0)
UNMEETABLE = tuple(Rule(v, 1, 3) if GRAPH.block_assignments[v] == 0 else Rule(v, 0, 2) for v in range(24))
"""Each can be met alone. But a walk must enter block 0, and once there it may neither leave it nor stay:
the next vertex outside claims block 0 for the very step that the last one inside claimed for block 1."""


@st.composite
def crowded_worlds(draw):
    """Small graphs in which up to half of the vertices are jumpers, with short and long jumps mixed."""
    K = draw(st.integers(2, 4))
    size = draw(st.integers(6, 10))
    config = GraphConfig(
        n=K * size,
        K=K,
        p_in=draw(st.floats(0.5, 0.9)),
        p_out=draw(st.floats(0.35, 0.6)),
        degree_exponent=draw(st.floats(0.0, 0.8)),
        max_attempts=500,
    )
    graph = generate_graph(config, draw(st.integers(0, 2**32)))
    rules_config = RulesConfig(
        jumpers_per_block=draw(st.integers(1, size // 2)),
        jump_lengths=tuple(draw(st.lists(st.integers(1, 25), min_size=1, max_size=5))),
    )
    return graph, designate_rules(graph, rules_config, 64, draw(st.integers(0, 2**32)))


@settings(max_examples=150, deadline=None)
@given(crowded_worlds(), st.integers(2, 60), st.integers(0, 2**32))
def test_every_rule_met_is_obeyed(world, length, seed):
    graph, rules = world
    walks = generate_walks(graph, rules, 60, length, seed).walks
    got = score(walks, graph, rules)
    assert walks.shape == (60, length)
    assert got.edge_passed == got.edge_checks == 60 * (length - 1)
    assert got.rule_passed == got.rule_checks


def test_rules_met_inside_the_span_of_another_are_met_often():
    walks = generate_walks(GRAPH, RULES, 200, 40, seed=0).walks.tolist()
    rule_of = {rule.vertex: rule for rule in RULES}
    nested = 0
    for walk in walks:
        spans = [(t, t + rule_of[v].jump_length) for t, v in enumerate(walk) if v in rule_of]
        nested += sum(a < c and d < b for a, b in spans for c, d in spans)
    assert nested > 100


@pytest.mark.parametrize("walk_length", [1, 2, 3])
def test_a_rule_whose_deadline_lies_beyond_the_end_asks_for_nothing(walk_length):
    rules = tuple(Rule(v, 0, 3) for v in range(GRAPH.n))
    result = generate_walks(GRAPH, rules, 2000, walk_length, seed=0)
    assert result.accepted == result.attempts
    assert set(GRAPH.block_assignments[result.walks[:, -1]].tolist()) == {0, 1, 2}


def test_without_rules_every_neighbour_is_equally_likely():
    walks = generate_walks(GRAPH, (), 4000, 20, seed=3).walks.astype(int)
    counts = np.zeros((24, 24))
    np.add.at(counts, (walks[:, :-1].ravel(), walks[:, 1:].ravel()), 1)
    edges = GRAPH.adjacency.toarray()
    assert not counts[~edges].any()
    statistic = sum(chisquare(counts[v][edges[v]]).statistic for v in range(24))
    freedom = edges.sum() - 24
    assert abs(statistic - freedom) < 5 * np.sqrt(2 * freedom)


def test_first_vertices_are_uniform():
    first = generate_walks(GRAPH, (), 24_000, 2, seed=3).walks[:, 0]
    assert chisquare(np.bincount(first, minlength=24)).pvalue > 1e-4


def test_under_one_deadline_walks_are_uniform_walks_that_happen_to_meet_it():
    rule = RULES[0]
    rule = Rule(rule.vertex, rule.target_block, 4)
    walks = generate_walks(GRAPH, (rule,), 60_000, 5, seed=3).walks
    walks = walks[walks[:, 0] == rule.vertex]
    edges = GRAPH.adjacency.toarray()
    step = edges / edges.sum(axis=1, keepdims=True)
    meets = (GRAPH.block_assignments == rule.target_block).astype(float)
    # Law of (vertex after two steps, vertex after four) of the conditioned uniform walk.
    two = np.linalg.matrix_power(step, 2)
    law = two[rule.vertex][:, None] * two * meets
    counts = np.zeros((24, 24))
    np.add.at(counts, (walks[:, 2], walks[:, 4]), 1)
    expected = law / law.sum() * len(walks)
    likely = expected > 5
    assert likely.sum() > 50
    assert not counts[law == 0].any()
    statistic = ((counts - expected)[likely] ** 2 / expected[likely]).sum()
    assert abs(statistic - likely.sum()) < 5 * np.sqrt(2 * likely.sum())


def test_the_same_seed_gives_the_same_walks_and_another_seed_others():
    first, again, other = (generate_walks(GRAPH, RULES, 50, 30, seed).walks for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()


def test_the_walks_do_not_depend_on_the_threads_that_run_beside():
    alone = generate_walks(GRAPH, RULES, 500, 30, seed=1).walks
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda _: generate_walks(GRAPH, RULES, 500, 30, seed=1).walks, range(4)))
    assert all((walks == alone).all() for walks in together)


@pytest.mark.parametrize("num_walks", [1, 99, 100, 101, 350])
def test_any_number_of_walks_is_made_of_passes(num_walks, monkeypatch):
    monkeypatch.setattr(generator, "PASS_SIZE", 100)
    result = generate_walks(GRAPH, RULES, num_walks, 30, seed=0)
    assert result.walks.shape == (num_walks, 30)
    assert score(result.walks, GRAPH, RULES).rule_compliance in {1.0, None}
    assert result.attempts >= result.accepted >= num_walks


def test_progress_counts_the_finished_walks(monkeypatch):
    monkeypatch.setattr(generator, "PASS_SIZE", 100)
    seen = []
    generate_walks(GRAPH, RULES, 250, 30, seed=0, progress=seen.append)
    assert seen == sorted(seen)
    assert len(seen) >= 3
    assert seen[-1] == 250


def test_should_stop_is_asked_at_every_step_unless_it_was_asked_just_now(monkeypatch):
    asked = []
    generate_walks(GRAPH, RULES, 50, 300, seed=0, should_stop=lambda: bool(asked.append(1)))
    assert 1 <= len(asked) < 300
    asked.clear()
    monkeypatch.setattr(generator, "POLL_SECONDS", 0.0)
    generate_walks(GRAPH, RULES, 50, 300, seed=0, should_stop=lambda: bool(asked.append(1)))
    assert len(asked) >= 300


def test_a_stop_in_the_middle_of_a_pass_interrupts(monkeypatch):
    monkeypatch.setattr(generator, "POLL_SECONDS", 0.0)
    answers = iter([False] * 100 + [True])
    with pytest.raises(Interrupted):
        generate_walks(GRAPH, RULES, 50, 300, seed=0, should_stop=lambda: next(answers))


def test_rules_that_cannot_be_met_together_are_an_error_with_a_cure():
    with pytest.raises(ConfigError, match="use fewer jumpers") as caught:
        generate_walks(GRAPH, UNMEETABLE, 10, 12, seed=0)
    assert caught.value.field == "walks.rules.jumpers_per_block"
    assert caught.value.value == 8


def test_two_rules_may_claim_the_same_step_for_the_same_block():
    rules = tuple(Rule(v, 1, 3) if GRAPH.block_assignments[v] == 0 else Rule(v, 1, 2) for v in range(24))
    walks = generate_walks(GRAPH, rules, 200, 5, seed=0).walks
    blocks = GRAPH.block_assignments[walks]
    shared = (blocks[:, 0] == 0) & (blocks[:, 1] != 0)
    assert shared.any()
    assert (blocks[shared, 3] == 1).all()


def test_two_rules_on_one_vertex_are_refused():
    with pytest.raises(ValueError, match="vertex of another rule"):
        generate_walks(GRAPH, (Rule(0, 1, 2), Rule(0, 2, 3)), 10, 12, seed=0)


def test_a_rule_that_no_path_meets_is_refused():
    edges = GRAPH.adjacency.toarray()
    vertex, block = next(
        (v, b) for v, b in product(range(24), range(3)) if not edges[v][GRAPH.block_assignments == b].any()
    )
    with pytest.raises(ValueError, match="no path"):
        generate_walks(GRAPH, (Rule(vertex, block, 1),), 10, 12, seed=0)


@settings(max_examples=20, deadline=None)
@given(given_length=st.integers(1, 6), more=st.integers(0, 10), seed=st.integers(0, 2**32))
def test_rule_blind_walks_continue_their_prompts_along_edges(given_length, more, seed):
    prompts = generate_walks(GRAPH, RULES, 30, given_length, seed).walks
    walks = random_walks(GRAPH, prompts, given_length + more, seed)
    assert walks.shape == (30, given_length + more)
    assert (walks[:, :given_length] == prompts).all()
    assert score(walks, GRAPH, RULES).edge_passed == 30 * (given_length + more - 1)


def test_rule_blind_walks_choose_every_neighbour_equally_often():
    walks = random_walks(GRAPH, np.full((20_000, 1), 5), 2, seed=0)
    counts = np.bincount(walks[:, 1], minlength=24)
    neighbours = GRAPH.adjacency.toarray()[5]
    assert counts[neighbours].sum() == 20_000
    assert chisquare(counts[neighbours]).pvalue > 1e-4


def test_rule_blind_walks_break_rules_and_are_seeded():
    prompts = generate_walks(GRAPH, RULES, 200, 4, seed=0).walks
    first, again, other = (random_walks(GRAPH, prompts, 30, seed) for seed in (1, 1, 2))
    assert score(first, GRAPH, RULES, start=4).rule_compliance < 0.7
    assert (first == again).all()
    assert (first != other).any()
