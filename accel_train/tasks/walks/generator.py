"""Random walks that obey every rule they meet, nested and overlapping rules included.

A walk is drawn step by step. Far from any deadline the next vertex is a uniform choice among
the neighbours. Near one it is drawn from the uniform walk *conditioned* on meeting the nearest
deadline (a Doob h-transform): neighbour u has the weight ``h(u)``, the probability that a uniform
walk from u is in the target block when the deadline comes, one sparse product per remaining step.
Neighbours that contradict another open deadline have the weight zero, and a walk that is left
with no neighbour is given up and redrawn. So the guidance is exact for one deadline at a time;
what it misses of the interplay of several is paid for in redrawn walks, never in broken rules.

Walks are drawn in passes: thousands of walks advance together, time-major, one numpy operation
for all. One thread does it: the operations are so short that two threads, taking the interpreter
from each other, were no faster.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array, diags_array

from accel_train.errors import ConfigError, Interrupted
from accel_train.process.work import StopCheck, never
from accel_train.tasks.walks.graph import Graph, Rule

Vertices = NDArray[np.intp]

PASS_SIZE = 16_384
"""Walks per pass: enough to drown the interpreter's overhead, few enough to stay near the cache."""
NEARLY_CONSTANT = 0.05
"""Relative spread of h over the vertices below which a deadline is too far away to steer by."""
MIN_ACCEPTANCE = 0.01
"""Share of finished walks below which the rules count as too tight."""
POLL_SECONDS = 0.05
"""Least time between two questions to ``should_stop``."""


@dataclass(frozen=True, eq=False)
class WalkResult:
    """Walks and what they cost.

    Attributes:
        walks: ``(num_walks, walk_length)`` uint16, the vertices visited.
        attempts: walks begun, the given-up ones included.
        accepted: walks among them that reached their end.
    """

    walks: NDArray[np.uint16]
    attempts: int
    accepted: int


def generate_walks(
    graph: Graph,
    rules: Sequence[Rule],
    num_walks: int,
    walk_length: int,
    seed: int,
    *,
    should_stop: StopCheck = never,
    progress: Callable[[int], None] = lambda _finished: None,
) -> WalkResult:
    """Draw walks from uniformly drawn first vertices in which every rule met is obeyed.

    A rule whose deadline lies at or beyond the end of the walk asks for nothing.

    Args:
        graph: the graph.
        rules: the rules, at most one per vertex.
        num_walks: walks wanted.
        walk_length: vertices per walk.
        seed: the same seed gives the same walks.
        should_stop: polled about every 50 ms.
        progress: called with the number of walks finished so far.

    Raises:
        Interrupted: ``should_stop()`` turned true.
        ConfigError: the rules contradict each other so often that hardly a walk can be finished.
        ValueError: two rules have one vertex, or a rule's target cannot be reached from its vertex.
    """
    check = _poller(should_stop)
    guide = _Guide(graph, rules, check)
    rng = np.random.default_rng(seed)
    walks = np.empty((num_walks, walk_length), dtype=np.uint16)
    done = attempts = accepted = 0
    while done < num_walks:
        expected = (accepted + 1) / (attempts + 1)
        size = min(PASS_SIZE, int(1.05 * (num_walks - done) / expected) + 16)
        finished = _draw_pass(guide, size, walk_length, rng, check)
        attempts += size
        accepted += finished.shape[1]
        if attempts >= 100 / MIN_ACCEPTANCE and accepted < MIN_ACCEPTANCE * attempts:
            rule = (
                f"gives rules that contradict each other: {accepted} of {attempts} walks of {walk_length} vertices "
                "could be finished; use fewer jumpers, longer jumps, shorter walks or a denser graph"
            )
            raise ConfigError("walks.rules.jumpers_per_block", len(rules) // graph.num_blocks, rule)
        used = min(finished.shape[1], num_walks - done)
        walks[done : done + used] = finished[:, :used].T
        done += used
        progress(done)
    return WalkResult(walks, attempts, accepted)


def random_walks(graph: Graph, prompts: NDArray[np.integer], length: int, seed: int) -> NDArray[np.uint16]:
    """Continue prompts by a uniform random walk that knows no rules.

    Args:
        graph: the graph.
        prompts: ``(num, prompt_length)`` vertices, at least one each.
        length: vertices per walk, prompt included.
        seed: seed of the walk.

    Returns:
        ``(num, length)`` uint16 walks that begin with the prompts.
    """
    guide = _Guide(graph, (), _poller(never))
    rng = np.random.default_rng(seed)
    num, given = prompts.shape
    walks = np.empty((num, length), dtype=np.uint16)
    walks[:, :given] = prompts[:, :length]
    here = prompts[:, -1].astype(np.intp)
    for t in range(given, length):
        here = guide.uniform_step(here, rng)
        walks[:, t] = here
    return walks


def _poller(should_stop: StopCheck) -> Callable[[], None]:
    """A function to be called often, which asks ``should_stop`` now and then and raises if it is told to."""
    due = 0.0

    def check() -> None:
        nonlocal due
        if time.monotonic() >= due:
            if should_stop():
                raise Interrupted("the walks were not finished")
            due = time.monotonic() + POLL_SECONDS

    return check


def _draw_pass(
    guide: _Guide, size: int, length: int, rng: np.random.Generator, check: Callable[[], None]
) -> NDArray[np.uint16]:
    """Begin ``size`` walks and return those that reach their end, ``(length, finished)``."""
    walks = np.empty((length, size), dtype=np.uint16)
    level = np.zeros((length, size), dtype=guide.level_dtype)
    alive = np.ones(size, dtype=np.bool_)
    there: Vertices = rng.integers(guide.n, size=size)
    for t in range(length):
        check()
        if t > 0:
            here, before = there, level[t - 1]
            there = guide.uniform_step(here, rng)
            steered = np.flatnonzero(before != 0)
            there[steered] = guide.steered_step(before[steered], here[steered], rng)
            # Only who meets a deadline while another is near, or lands on a jumper, can be in the wrong place.
            meeting = steered[(before[steered] > guide.last_step) & (level[t, steered] > 0)]
            doubtful = np.concatenate([guide.at_jumper(there), meeting])
            refused = doubtful[~guide.allowed(level, t, doubtful, there[doubtful])]
            if refused.size:
                refused = np.unique(refused)
                there[refused], stuck = guide.masked_step(level, t, refused, here[refused], rng)
                dead = refused[stuck]
                alive[dead] = False
                level[t:, dead] = 0
        walks[t] = there
        jumping = guide.at_jumper(there)
        guide.open_deadlines(level, t, jumping, there[jumping])
    return walks[:, alive]


class _Guide:
    """Tables for one graph and its rules.

    A walk's *level* says how its next step is drawn: 0 is uniform; ``(horizon - r) * K + b + 1``
    heads for block b, to be reached in r steps. The nearer deadline has the greater level.

    Attributes:
        degree: ``(n,)`` float32 out-degrees.
        first: ``(n,)`` start of each vertex's neighbours.
        neighbours: ``(edges,)``.
        rule: ``(n,)`` number of the vertex's rule, 0 for none.
        jumper: ``(n,)`` whether it has one.
        jump: ``(rules + 1,)`` jump length of each rule.
        target: ``(rules + 1,)`` target block of each rule.
        horizon: steps before a deadline from which it steers.
        num_blocks: K.
        last_step: levels above this one meet their deadline with the next step.
        level_dtype: smallest type that holds every level.
        weight: ``(levels + 1, n)`` weight of stepping to a vertex.
        possible: ``(levels + 1, n)`` whether the level's deadline can be met from a vertex.
        cumulative: ``(levels, edges)`` float32 cumulative probability of each vertex's neighbours.
        shortcut: ``(levels, edges)`` for bucket i of a vertex's d equal buckets of [0, 1), the neighbour
            at which the search begins (guide table, Chen and Asau 1974): a draw takes about one comparison.
    """

    def __init__(self, graph: Graph, rules: Sequence[Rule], check: Callable[[], None]) -> None:
        self.n, self.num_blocks = graph.n, graph.num_blocks
        adjacency = graph.adjacency.astype(np.float64)
        self.degree = np.diff(adjacency.indptr).astype(np.float32)
        self.first: Vertices = adjacency.indptr[:-1].astype(np.intp)
        self.neighbours: Vertices = adjacency.indices.astype(np.intp)
        self.rule = np.zeros(self.n, dtype=np.intp)
        self.rule[[r.vertex for r in rules]] = np.arange(1, len(rules) + 1)
        self.jumper = self.rule > 0
        self.jump = np.array([0, *(r.jump_length for r in rules)], dtype=np.intp)
        self.target = np.array([0, *(r.target_block for r in rules)], dtype=np.intp)
        self.weight, self.possible = _conditioned_walk(graph, adjacency, int(self.jump.max()))
        self.cumulative, self.shortcut = _inverse_tables(self.weight, self.first, self.neighbours, check)
        self.horizon = len(self.cumulative) // self.num_blocks
        self.last_step = (self.horizon - 1) * self.num_blocks
        self.level_dtype = np.min_scalar_type(self.horizon * self.num_blocks)
        for number, r in enumerate(rules, start=1):
            if self.rule[r.vertex] != number:
                raise ValueError(f"{r} has the vertex of another rule; give each vertex one rule")
            if not self.possible[self.urgency(min(r.jump_length, self.horizon), r.target_block), r.vertex]:
                raise ValueError(f"{r} cannot be met: no path of that length leads there")

    def urgency(self, remaining: Any, block: Any) -> Any:
        """The level that heads for a block, to be reached in so many steps."""
        return (self.horizon - remaining) * self.num_blocks + block + 1

    def at_jumper(self, there: Vertices) -> Vertices:
        """Which walks are at a jumper."""
        return np.flatnonzero(self.jumper.take(there))

    def uniform_step(self, here: Vertices, rng: np.random.Generator) -> Vertices:
        choice = rng.random(here.size, dtype=np.float32)
        choice *= self.degree.take(here)
        return self.neighbours.take(self.first.take(here) + choice.astype(np.intp))

    def steered_step(self, level: NDArray[np.unsignedinteger], here: Vertices, rng: np.random.Generator) -> Vertices:
        choice = rng.random(here.size, dtype=np.float32)
        first = self.first.take(here)
        row = (level.astype(np.intp) - 1) * self.neighbours.size + first
        cumulative, shortcut = self.cumulative.reshape(-1), self.shortcut.reshape(-1)
        place = shortcut.take(row + (choice * self.degree.take(here)).astype(np.intp)).astype(np.intp)
        behind = np.flatnonzero(cumulative.take(row + place) <= choice)
        while behind.size:
            place[behind] += 1
            behind = behind[cumulative.take(row[behind] + place[behind]) <= choice[behind]]
        return self.neighbours.take(first + place)

    def allowed(self, level: NDArray[np.unsignedinteger], t: int, who: Vertices, there: Vertices) -> NDArray[np.bool_]:
        """Whether walk ``who`` may be at ``there`` at time t without breaking an open deadline."""
        rule = self.rule[there]
        deadline = t + self.jump[rule]
        checked = (rule > 0) & (deadline < len(level))
        # One step before it a deadline is the nearest one, so that row tells which block claims it.
        claimed = level[np.where(checked, deadline - 1, t), who]
        another: NDArray[np.bool_] = claimed != self.urgency(1, self.target[rule])
        conflict = checked & (claimed > self.last_step) & another
        possible: NDArray[np.bool_] = self.possible[level[t, who], there]
        return possible & ~conflict

    def masked_step(
        self, level: NDArray[np.unsignedinteger], t: int, who: Vertices, here: Vertices, rng: np.random.Generator
    ) -> tuple[Vertices, NDArray[np.bool_]]:
        """Draw among the allowed neighbours only; also tells which walks have none (and go anywhere)."""
        degree = self.degree[here].astype(np.intp)
        column = np.arange(degree.max())
        exists = column < degree[:, None]
        there = self.neighbours[self.first[here][:, None] + np.where(exists, column, 0)]
        weight = self.weight[level[t - 1, who][:, None], there]
        weight *= exists & self.allowed(level, t, who[:, None], there)
        cumulative = weight.cumsum(axis=1)
        total = cumulative[:, -1]
        choice = rng.random(who.size, dtype=np.float32) * total
        return there[np.arange(who.size), (cumulative > choice[:, None]).argmax(axis=1)], total == 0

    def open_deadlines(self, level: NDArray[np.unsignedinteger], t: int, who: Vertices, jumper: Vertices) -> None:
        """Enter the deadlines of walks that are at jumpers at time t."""
        rule = self.rule[jumper]
        jump = self.jump[rule]
        inside = t + jump < len(level)
        who, jump, target = who[inside], jump[inside], self.target[rule[inside]]
        remaining = np.arange(1, self.horizon + 1)[:, None]
        steers = remaining <= jump
        cell = ((t + jump - remaining) * level.shape[1] + who)[steers]
        flat = level.reshape(-1)
        flat[cell] = np.maximum(flat[cell], self.urgency(remaining, target)[steers].astype(level.dtype))


def _conditioned_walk(
    graph: Graph, adjacency: csr_array, max_jump: int
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """The ``weight`` and ``possible`` tables of :class:`_Guide`.

    ``h_0(u)`` is 1 in the target block and 0 elsewhere, ``h_r = P h_(r-1)`` with P the transition
    matrix of the uniform walk (scaled to a maximum of 1). A step with r steps remaining has the
    weights ``h_(r-1)`` and is possible where ``h_r > 0``.
    """
    uniform = diags_array(1.0 / np.diff(adjacency.indptr)) @ adjacency
    meets = [(graph.block_assignments[:, None] == np.arange(graph.num_blocks)).astype(np.float64)]
    while len(meets) <= max_jump and meets[-1].min() < 1.0 - NEARLY_CONSTANT:
        ahead = uniform @ meets[-1]
        meets.append(ahead / ahead.max(axis=0))
    free = np.ones((1, graph.n))
    weight = np.vstack([free, *(h.T for h in reversed(meets[:-1]))])
    possible = np.vstack([free, *(h.T for h in reversed(meets[1:]))]) > 0
    return weight, possible


def _inverse_tables(
    weight: NDArray[np.float64], first: Vertices, neighbours: Vertices, check: Callable[[], None]
) -> tuple[NDArray[np.float32], NDArray[np.uint16]]:
    """The ``cumulative`` and ``shortcut`` tables of :class:`_Guide`."""
    levels = len(weight) - 1
    cumulative = np.empty((levels, neighbours.size), dtype=np.float32)
    shortcut = np.empty((levels, neighbours.size), dtype=np.uint16)
    degree = np.diff(np.append(first, neighbours.size))
    row = np.repeat(np.arange(first.size), degree)
    place = np.arange(neighbours.size) - first[row]
    bucket = row + place / degree[row]
    for level in range(levels):
        check()
        # Rows are brought to a sum of 1 first: in one running sum a row of tiny weights would be lost.
        probability = weight[level + 1, neighbours]
        total = np.add.reduceat(probability, first)
        probability /= np.where(total > 0, total, 1.0)[row]
        running = np.append(0.0, probability.cumsum())
        before = running[first]
        total = running[first + degree] - before
        running = (running[1:] - before[row]) / np.where(total > 0, total, 1.0)[row]
        cumulative[level] = running
        start = np.searchsorted(running + row, bucket, side="right") - first[row]
        shortcut[level] = np.minimum(start, degree[row] - 1)
    return cumulative, shortcut
