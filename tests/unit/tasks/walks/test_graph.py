from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array

from accel_train.errors import ConfigError
from accel_train.tasks.walks.config import GraphConfig, RulesConfig
from accel_train.tasks.walks.graph import Graph, designate_rules, generate_graph


@st.composite
def dense_configs(draw):
    K = draw(st.integers(2, 5))
    return GraphConfig(
        n=K * draw(st.integers(3, 12)),
        K=K,
        p_in=draw(st.floats(0.5, 1.0)),
        p_out=draw(st.floats(0.3, 1.0)),
        degree_exponent=draw(st.floats(0.0, 1.0)),
        max_attempts=200,
    )


@settings(max_examples=50, deadline=None)
@given(dense_configs(), st.integers(0, 2**32))
def test_every_vertex_reaches_every_other(config, seed):
    edges = generate_graph(config, seed).adjacency.toarray()
    reach = np.eye(config.n, dtype=bool)
    for _ in range(config.n):
        reach |= (reach.astype(int) @ edges.astype(int)) > 0
    assert reach.all()


@settings(max_examples=50, deadline=None)
@given(dense_configs(), st.integers(0, 2**32))
def test_there_are_no_self_loops_and_the_blocks_are_equal(config, seed):
    graph = generate_graph(config, seed)
    assert graph.adjacency.shape == (config.n, config.n)
    assert not graph.adjacency.diagonal().any()
    assert np.bincount(graph.block_assignments).tolist() == [config.n // config.K] * config.K


@pytest.mark.parametrize("exponent", [0.0, 1.0])
@pytest.mark.parametrize("p_in", [0.25, 0.6], ids=["little clipped", "much clipped"])
def test_mean_densities_are_p_in_and_p_out(p_in, exponent):
    config = GraphConfig(n=400, K=4, p_in=p_in, p_out=0.1, degree_exponent=exponent)
    graph = generate_graph(config, seed=3)
    edges = graph.adjacency.toarray()
    same = graph.block_assignments[:, None] == graph.block_assignments
    pairs_in, pairs_out = same.sum() - config.n, (~same).sum()
    # Five standard deviations of a mean of independent edges, or more.
    assert edges[same].sum() / pairs_in == pytest.approx(p_in, abs=2.5 / np.sqrt(pairs_in))
    assert edges[~same].sum() / pairs_out == pytest.approx(0.1, abs=2.5 / np.sqrt(pairs_out))


def test_certain_edges_give_the_complete_graph():
    graph = generate_graph(GraphConfig(n=12, K=3, p_in=1.0, p_out=1.0), seed=0)
    assert graph.adjacency.nnz == 12 * 11


@pytest.mark.parametrize("axis", [0, 1], ids=["in-degrees", "out-degrees"])
def test_degrees_are_heavy_tailed_only_with_a_positive_exponent(axis):
    def spread(exponent):
        graph = generate_graph(GraphConfig(n=400, K=4, p_in=0.2, p_out=0.05, degree_exponent=exponent), seed=1)
        degrees = graph.adjacency.toarray().sum(axis=axis)
        return degrees.max() / np.median(degrees)

    assert spread(1.0) > 4.0
    assert spread(0.0) < 2.0


def test_the_same_seed_gives_the_same_graph_and_another_seed_another():
    config = GraphConfig(n=40, K=4, p_in=0.6, p_out=0.3)
    first, again, other = (generate_graph(config, seed).adjacency.toarray() for seed in (5, 5, 6))
    assert (first == again).all()
    assert (first != other).any()


def test_a_graph_that_is_not_connected_is_retried_with_the_next_seed():
    config = GraphConfig(n=100, K=4, p_in=0.25, p_out=0.03, max_attempts=100)
    retried = next(graph for seed in range(50) if (graph := generate_graph(config, seed * 1000)).attempts > 1)
    assert retried.seed % 1000 == retried.attempts - 1
    direct = generate_graph(config, retried.seed)
    assert direct.attempts == 1
    assert (direct.adjacency != retried.adjacency).nnz == 0


def test_an_unconnectable_graph_names_the_probabilities_to_raise():
    with pytest.raises(ConfigError, match=r"raise walks\.graph\.p_in or walks\.graph\.p_out") as caught:
        generate_graph(GraphConfig(n=40, K=4, p_in=0.02, p_out=0.001, max_attempts=3), seed=0)
    assert caught.value.field == "walks.graph.p_in"
    assert caught.value.value == 0.02
    assert "walks.graph.p_out = 0.001" in str(caught.value)
    assert "3 attempts" in str(caught.value)


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
