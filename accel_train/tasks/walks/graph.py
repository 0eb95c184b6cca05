"""A graph and its rules.

The graph is a directed degree-corrected stochastic block model (Karrer and Newman 2011). Every pair
of vertices gets its probability in a dense matrix, one pair of blocks at a time: quadratic in the
block size, which is nothing at the sizes that small models can learn, and it lets the mean
probability be met exactly even where single probabilities are clipped at 1.

A jumper rule: a walk at a jumper must be in the rule's target block some steps later. Rules are
drawn so that each of them says something: from its jumper, in exactly that many steps, the target
block can be reached and can be missed.

Karrer, B. and Newman, M. E. J., Stochastic blockmodels and community structure in networks,
Physical Review E 83, 016107 (2011).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from accel_train.errors import ConfigError
from accel_train.tasks.walks.config import GraphConfig, RulesConfig


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


@dataclass(frozen=True)
class Rule:
    """A walk at ``vertex`` at step t must be in ``target_block`` at step ``t + jump_length``."""

    vertex: int
    target_block: int
    jump_length: int


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
    why = (
        f"with walks.graph.p_out = {config.p_out} gave no strongly connected graph of {config.n} vertices "
        f"in {config.max_attempts} attempts; raise walks.graph.p_in or walks.graph.p_out, or lower "
        "walks.graph.degree_exponent"
    )
    raise ConfigError("walks.graph.p_in", config.p_in, why)


def designate_rules(graph: Graph, config: RulesConfig, context_length: int, seed: int) -> tuple[Rule, ...]:
    """Draw ``config.jumpers_per_block`` distinct jumpers in every block, one rule each.

    The jump lengths are dealt in turn, block after block, so every length is used (if there are
    as many rules as lengths) and a block with several jumpers has several lengths. The target is
    always another block than the jumper's own.

    Args:
        graph: the graph.
        config: number of jumpers and jump lengths.
        context_length: tokens in the model's context, the unit of ``config.jump_scales``.
        seed: seed of jumpers and targets.

    Returns:
        The rules, ordered by block.

    Raises:
        ConfigError: a block has no jumper left for which some rule of the dealt length is non-trivial.
    """
    rng = np.random.default_rng(seed)
    lengths = config.lengths(context_length)
    reachable = _reachable_blocks(graph, lengths)
    rules: list[Rule] = []
    for block in range(graph.num_blocks):
        candidates = rng.permutation(np.flatnonzero(graph.block_assignments == block)).tolist()
        for _ in range(config.jumpers_per_block):
            length = lengths[len(rules) % len(lengths)]
            vertex = next((v for v in candidates if reachable[length][v].sum() >= 2), None)
            if vertex is None:
                why = (
                    f"leaves no jumper in block {block} whose walks can be in two blocks after exactly {length} "
                    "steps, so the rule would say nothing; use another length or fewer walks.rules.jumpers_per_block, "
                    "or raise walks.graph.p_out"
                )
                raise ConfigError(config.source, length, why)
            candidates.remove(vertex)
            targets = np.flatnonzero(reachable[length][vertex])
            target = int(rng.choice(targets[targets != block]))
            rules.append(Rule(vertex, target, length))
    return tuple(rules)


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


def _reachable_blocks(graph: Graph, lengths: Iterable[int]) -> dict[int, NDArray[np.bool_]]:
    """For every length, an ``(n, K)`` mask: can a walk from v be in block b after exactly that many steps?"""
    wanted = set(lengths)
    step = graph.adjacency.astype(np.int64)
    mask = graph.block_assignments[:, None] == np.arange(graph.num_blocks)
    masks: dict[int, NDArray[np.bool_]] = {}
    for length in range(1, max(wanted) + 1):
        mask = (step @ mask.astype(np.int64)) > 0
        if length in wanted:
            masks[length] = mask
    return masks
