"""The scorer: how many transitions are edges, and how many rules met are obeyed.

One vectorised function judges the corpus, the preflight and the model's output alike, so a figure
from one can be compared with a figure from another. It knows nothing of how the walks were made:
it reads the graph and the rules, and walks come in chunks so that memory stays bounded.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from accel_train.tasks.walks.graph import Graph, Rule

CHUNK_TOKENS = 1 << 20
"""Tokens judged at once."""
DENSE_VERTICES = 8192
"""Up to this many vertices edges are looked up in a dense table (a byte per pair), beyond it by bisection."""


@dataclass(frozen=True, eq=False)
class Compliance:
    """Counts of checks and passes.

    Attributes:
        edge_checks: transitions judged.
        edge_passed: transitions that are edges of the graph.
        rule_checks: rule visits judged.
        rule_passed: rule visits whose deadline found the walk in the target block.
        distinct_sequences: different sequences among the walks.
        checks_per_rule: ``(rules,)`` int64, ``rule_checks`` split by rule.
        passed_per_rule: ``(rules,)`` int64, ``rule_passed`` split by rule.
    """

    edge_checks: int
    edge_passed: int
    rule_checks: int
    rule_passed: int
    distinct_sequences: int
    checks_per_rule: NDArray[np.int64]
    passed_per_rule: NDArray[np.int64]

    @property
    def edge_compliance(self) -> float | None:
        """Share of the transitions judged that are edges; None if there were none."""
        return self.edge_passed / self.edge_checks if self.edge_checks else None

    @property
    def rule_compliance(self) -> float | None:
        """Share of the rule visits judged that were obeyed; None if there were none."""
        return self.rule_passed / self.rule_checks if self.rule_checks else None


def score(walks: NDArray[np.integer], graph: Graph, rules: Sequence[Rule], *, start: int = 1) -> Compliance:
    """Judge walks against the graph and the rules.

    Judged are the transitions into tokens at index ``start`` and later, and the rule visits anywhere
    whose deadline lies in ``[start, length)``. A token that is no vertex has no edges, meets no rule
    and lies in no block.

    Args:
        walks: ``(num, length)`` integers of any width.
        graph: the graph.
        rules: the rules to judge by.
        start: first generated index, at least 1; everything before it is a given prompt.
    """
    if start < 1:
        raise ValueError(f"start must be at least 1 (the first token has no transition into it), not {start}")
    num, length = walks.shape
    judge = _Judge(graph, rules, start)
    edge_passed = 0
    checks, passed = np.zeros((2, len(rules)), dtype=np.int64)
    digests: set[bytes] = set()
    rows = max(1, CHUNK_TOKENS // max(1, length))
    for begin in range(0, num, rows):
        chunk = np.ascontiguousarray(walks[begin : begin + rows])
        digests.update(hashlib.blake2b(walk, digest_size=16).digest() for walk in chunk)
        vertices = judge.vertices(chunk)
        edge_passed += judge.edges(vertices)
        judge.count_rules(vertices, checks, passed)
    return Compliance(
        edge_checks=num * max(0, length - start),
        edge_passed=edge_passed,
        rule_checks=int(checks.sum()),
        rule_passed=int(passed.sum()),
        distinct_sequences=len(digests),
        checks_per_rule=checks,
        passed_per_rule=passed,
    )


class _Judge:
    """Look-up tables with one more vertex, n, that stands for every token that is none."""

    def __init__(self, graph: Graph, rules: Sequence[Rule], start: int) -> None:
        self.graph, self.rules, self.start = graph, rules, start
        self.block = np.append(graph.block_assignments, -1)
        self.jumper = np.zeros(graph.n + 1, dtype=np.bool_)
        self.jumper[[rule.vertex for rule in rules]] = True
        source, sink = graph.adjacency.nonzero()
        self.edge_keys = np.sort(source.astype(np.int64) * (graph.n + 1) + sink)
        self.is_edge: NDArray[np.bool_] | None = None
        if graph.n <= DENSE_VERTICES:
            self.is_edge = np.zeros((graph.n + 1) ** 2, dtype=np.bool_)
            self.is_edge[self.edge_keys] = True

    def vertices(self, tokens: NDArray[np.integer]) -> NDArray[np.intp]:
        vertices = tokens.astype(np.intp)
        vertices[(vertices < 0) | (vertices >= self.graph.n)] = self.graph.n
        return vertices

    def edges(self, vertices: NDArray[np.intp]) -> int:
        keys = vertices[:, self.start - 1 : -1] * (self.graph.n + 1) + vertices[:, self.start :]
        if self.is_edge is not None:
            return int(np.count_nonzero(self.is_edge.take(keys)))
        place = np.searchsorted(self.edge_keys, keys).clip(max=self.edge_keys.size - 1)
        return int(np.count_nonzero(self.edge_keys[place] == keys))

    def count_rules(self, vertices: NDArray[np.intp], checks: NDArray[np.int64], passed: NDArray[np.int64]) -> None:
        walk, step = np.nonzero(self.jumper.take(vertices))
        visited = vertices[walk, step]
        for i, rule in enumerate(self.rules):
            mine = visited == rule.vertex
            deadline = step[mine] + rule.jump_length
            due = (deadline >= self.start) & (deadline < vertices.shape[1])
            arrived = self.block[vertices[walk[mine][due], deadline[due]]]
            checks[i] += arrived.size
            passed[i] += np.count_nonzero(arrived == rule.target_block)


def wilson_interval(passed: int, checks: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a proportion (95 % with the default z); (0, 1) without checks.

    Wilson, E. B., Probable inference, the law of succession, and statistical inference,
    Journal of the American Statistical Association 22, 209-212 (1927).
    """
    if checks == 0:
        return 0.0, 1.0
    share, spread = passed / checks, z * z / checks
    centre = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / checks + spread / (4 * checks)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)
