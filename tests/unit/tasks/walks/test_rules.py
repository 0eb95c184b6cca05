from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array

from accel_train.errors import ConfigError
from accel_train.tasks.walks.config import GraphConfig, RulesConfig
from accel_train.tasks.walks.graph import Graph, generate_graph
from accel_train.tasks.walks.rules import designate_rules

GRAPH = generate_graph(GraphConfig(n=60, K=4, p_in=0.3, p_out=0.06, degree_exponent=0.5, max_attempts=500), seed=0)

configs = st.builds(
    RulesConfig,
    jumpers_per_block=st.integers(1, 10),
    jump_lengths=st.lists(st.integers(1, 20), min_size=1, max_size=5, unique=True).map(tuple),
)


def ring(n: int, K: int) -> Graph:
    """A directed ring: after any number of steps a walk can be in one place only."""
    edges = np.roll(np.eye(n, dtype=bool), 1, axis=1)
    return Graph(csr_array(edges), np.repeat(np.arange(K), n // K), seed=0, attempts=1)


@settings(max_examples=60, deadline=None)
@given(configs, st.integers(0, 2**32))
def test_every_rule_is_non_trivial(config, seed):
    edges = GRAPH.adjacency.toarray()
    for rule in designate_rules(GRAPH, config, 64, seed):
        ends = np.arange(GRAPH.n) == rule.vertex
        for _ in range(rule.jump_length):
            ends = edges[ends].any(axis=0)
        blocks = set(GRAPH.block_assignments[ends].tolist())
        assert rule.target_block in blocks
        assert len(blocks) > 1


@settings(max_examples=60, deadline=None)
@given(configs, st.integers(0, 2**32))
def test_every_block_has_its_number_of_distinct_jumpers(config, seed):
    vertices = [rule.vertex for rule in designate_rules(GRAPH, config, 64, seed)]
    assert len(set(vertices)) == len(vertices)
    assert Counter(GRAPH.block_assignments[vertices].tolist()) == dict.fromkeys(range(4), config.jumpers_per_block)


@settings(max_examples=60, deadline=None)
@given(configs, st.integers(0, 2**32))
def test_the_target_is_another_block_than_the_jumpers(config, seed):
    for rule in designate_rules(GRAPH, config, 64, seed):
        assert rule.target_block != GRAPH.block_assignments[rule.vertex]


@settings(max_examples=60, deadline=None)
@given(configs, st.integers(0, 2**32))
def test_jump_lengths_are_dealt_in_turn(config, seed):
    rules = designate_rules(GRAPH, config, 64, seed)
    lengths = [rule.jump_length for rule in rules]
    assert set(lengths) == set(config.jump_lengths[: len(rules)])
    if config.jumpers_per_block > 1 and len(config.jump_lengths) > 1:
        for block in range(4):
            mine = lengths[block * config.jumpers_per_block : (block + 1) * config.jumpers_per_block]
            assert len(set(mine)) > 1


def test_jump_scales_are_fractions_of_the_context():
    rules = designate_rules(GRAPH, RulesConfig(jump_scales=(0.25, 0.5)), 32, seed=0)
    assert {rule.jump_length for rule in rules} == {8, 16}


def test_the_same_seed_gives_the_same_rules_and_another_seed_others():
    first, again, other = (designate_rules(GRAPH, RulesConfig(), 64, seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other


@pytest.mark.parametrize(
    ("config", "field", "length"),
    [
        (RulesConfig(jump_lengths=(3,)), "walks.rules.jump_lengths", 3),
        (RulesConfig(jump_scales=(0.5,)), "walks.rules.jump_scales", 32),
    ],
)
def test_a_length_that_allows_only_trivial_rules_is_named(config, field, length):
    with pytest.raises(ConfigError, match="use another length") as caught:
        designate_rules(ring(12, 3), config, 64, seed=0)
    assert caught.value.field == field
    assert caught.value.value == length
