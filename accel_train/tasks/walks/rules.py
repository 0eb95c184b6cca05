"""Jumper rules: a walk at a jumper must be in the rule's target block some steps later.

Rules are drawn so that each of them says something: from its jumper, in exactly that many steps,
the target block can be reached and can be missed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from accel_train.errors import ConfigError
from accel_train.tasks.walks.config import RulesConfig
from accel_train.tasks.walks.graph import Graph


@dataclass(frozen=True)
class Rule:
    """A walk at ``vertex`` at step t must be in ``target_block`` at step ``t + jump_length``."""

    vertex: int
    target_block: int
    jump_length: int


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
                raise ConfigError(
                    config.source,
                    length,
                    f"leaves no jumper in block {block} whose walks can be in two blocks after exactly {length} "
                    "steps, so the rule would say nothing; use another length or fewer walks.rules.jumpers_per_block, "
                    "or raise walks.graph.p_out",
                )
            candidates.remove(vertex)
            targets = np.flatnonzero(reachable[length][vertex])
            target = int(rng.choice(targets[targets != block]))
            rules.append(Rule(vertex, target, length))
    return tuple(rules)


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
