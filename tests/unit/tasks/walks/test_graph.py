import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accel_train.errors import ConfigError
from accel_train.tasks.walks.config import GraphConfig
from accel_train.tasks.walks.graph import generate_graph


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
