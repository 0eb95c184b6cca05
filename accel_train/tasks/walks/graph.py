"""Directed degree-corrected stochastic block model (Karrer and Newman 2011).

Every pair of vertices gets its probability in a dense matrix, one pair of blocks at a time:
quadratic in the block size, which is nothing at the sizes that small models can learn, and it
lets the mean probability be met exactly even where single probabilities are clipped at 1.

Karrer, B. and Newman, M. E. J., Stochastic blockmodels and community structure in networks,
Physical Review E 83, 016107 (2011).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from accel_train.errors import ConfigError
from accel_train.tasks.walks.config import GraphConfig


@dataclass(frozen=True, eq=False)
class Graph:
    """A strongly connected directed graph whose vertices lie in equal blocks.

    Attributes:
        adjacency: ``(n, n)`` boolean CSR matrix without self-loops, column indices sorted;
            entry (u, v) is the edge from u to v.
        block_assignments: ``(n,)`` int64, the block of every vertex; block b holds the vertices
            from ``b * n / K`` up to ``(b + 1) * n / K``.
        seed: the seed that gave this graph.
        attempts: how many seeds were tried.
    """

    adjacency: csr_array
    block_assignments: NDArray[np.int64]
    seed: int
    attempts: int

    @property
    def n(self) -> int:
        """Number of vertices."""
        return int(self.block_assignments.size)

    @property
    def num_blocks(self) -> int:
        """Number of blocks, K."""
        return int(self.block_assignments.max()) + 1


def generate_graph(config: GraphConfig, seed: int) -> Graph:
    """Draw a strongly connected graph, trying ``seed``, ``seed + 1``, ... in turn.

    The edge from u to v exists with probability ``min(1, c * out_u * in_v)``. ``out`` and ``in``
    follow the Zipf law ``rank ** -degree_exponent`` inside each block, and ``c`` makes the mean
    over the pairs of two blocks ``p_in`` or ``p_out``. As in the directed model of Karrer and
    Newman, the two factors of a vertex are separate: their ranks are drawn independently, so that
    a vertex that is visited often is not for that reason one with many ways on.

    Args:
        config: sizes, probabilities and retries.
        seed: first seed to try.

    Raises:
        ConfigError: no strongly connected graph within ``config.max_attempts`` seeds.
    """
    for attempt in range(config.max_attempts):
        adjacency = _draw_adjacency(config, np.random.default_rng(seed + attempt))
        components, _ = connected_components(adjacency, connection="strong")
        if components == 1:
            blocks = np.repeat(np.arange(config.K), config.n // config.K)
            return Graph(adjacency, blocks, seed + attempt, attempt + 1)
    raise ConfigError(
        "walks.graph.p_in",
        config.p_in,
        f"with walks.graph.p_out = {config.p_out} gave no strongly connected graph of {config.n} vertices "
        f"in {config.max_attempts} attempts; raise walks.graph.p_in or walks.graph.p_out, or lower "
        "walks.graph.degree_exponent",
    )


def _draw_adjacency(config: GraphConfig, rng: np.random.Generator) -> csr_array:
    size = config.n // config.K
    zipf = np.arange(1, size + 1) ** -config.degree_exponent
    out_factor, in_factor = (np.stack([rng.permutation(zipf) for _ in range(config.K)]) for _ in range(2))
    edges = np.empty((config.n, config.n), dtype=bool)
    for a in range(config.K):
        for b in range(config.K):
            factor = np.outer(out_factor[a], in_factor[b])
            if a == b:
                np.fill_diagonal(factor, 0.0)
            probability = _scale_to_mean(factor, config.p_in if a == b else config.p_out)
            rows, columns = slice(a * size, (a + 1) * size), slice(b * size, (b + 1) * size)
            edges[rows, columns] = rng.random((size, size)) < probability
    return csr_array(edges)


def _scale_to_mean(factor: NDArray[np.float64], mean: float) -> NDArray[np.float64]:
    """``min(1, c * factor)`` with the c that gives its positive entries this mean."""
    largest_first = np.sort(factor[factor > 0])[::-1]
    rest = largest_first[::-1].cumsum()[::-1]
    # With the k largest entries clipped at 1 the others must make up the sum: the first k that clips no other is it.
    scale = (mean * rest.size - np.arange(rest.size)) / rest
    clipped = int(np.argmax(scale * largest_first <= 1.0))
    return np.clip(float(scale[clipped]) * factor, 0.0, 1.0)
