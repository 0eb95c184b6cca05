"""The graph, its rules and the walks: a pure function of the configuration, built once and then shared."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.sparse import save_npz

from accel_train.config.fields import result_values
from accel_train.errors import CorpusError
from accel_train.files.atomic import sha256_json
from accel_train.files.shared import cached
from accel_train.process.console import Meter
from accel_train.process.work import WorkContext
from accel_train.tasks.walks.compliance import scorable_rules
from accel_train.tasks.walks.config import WalksConfig
from accel_train.tasks.walks.generator import generate_walks
from accel_train.tasks.walks.graph import Graph, generate_graph
from accel_train.tasks.walks.rules import Rule, designate_rules

# Part of the cache key: raise it when the same configuration would give other walks.
_CORPUS_VERSION = 1
_GRAPH, _RULES, _TRAIN, _HELD_OUT, BLIND, SAMPLED = range(6)
"""Streams of random numbers; the last two are the gate's."""

Walks = npt.NDArray[Any]
"""Vertices ``(walks, length)``, memory-mapped."""


class WalkCorpus:
    """Training walks and held-out walks on one graph.

    Args:
        section: graph, rules, number and length of walks, number of held-out walks.
        context: tokens that the model sees.
        seed: of everything random.
    """

    def __init__(self, section: WalksConfig, context: int, seed: int) -> None:
        self._section, self._context, self._seed = section, context, seed
        self._directory = Path()
        self._graph: Graph | None = None
        self._graph_seconds = 0.0
        self._rules: tuple[Rule, ...] = ()
        self.held_out: Walks = np.empty((0, 0), np.uint16)
        """Walks that the gate's prompts are the beginnings of; after :meth:`open`."""
        self.walks: Walks = np.empty((0, 0), np.uint16)
        """Walks for training; after :meth:`open`."""

    @property
    def directory(self) -> Path:
        """Where the walks lie; after :meth:`open`."""
        return self._directory

    @property
    def graph(self) -> Graph:
        """The graph, drawn at first use."""
        if self._graph is None:
            started = time.perf_counter()
            self._graph = generate_graph(self._section.graph, self.stream_seed(_GRAPH))
            self._rules = designate_rules(self._graph, self._section.rules, self._context, self.stream_seed(_RULES))
            self._graph_seconds = time.perf_counter() - started
        return self._graph

    @property
    def rules(self) -> tuple[Rule, ...]:
        """All rules of the graph."""
        _ = self.graph
        return self._rules

    @property
    def scored_rules(self) -> tuple[Rule, ...]:
        """The rules whose jump is visible inside the context."""
        return scorable_rules(self.rules, self._context)[0]

    @property
    def key(self) -> str:
        """Hash of everything that defines the walks."""
        section = self._section
        defines = {
            "version": _CORPUS_VERSION,
            "seed": self._seed,
            "graph": result_values(section.graph),
            "jumpers_per_block": section.rules.jumpers_per_block,
            "jump_lengths": list(section.rules.lengths(self._context)),
            "walks": {"num_walks": section.num_walks, "walk_length": section.walk_length},
            "held_out": [section.gate.num_sequences, self._context + 1],
        }
        return sha256_json(defines)[:16]

    def stream_seed(self, stream: int) -> int:
        """Return independent seeds for the graph, the rules, the walks and everything the gate draws."""
        return int(np.random.SeedSequence([self._seed, stream]).generate_state(1, np.uint64)[0] >> 1)

    def build(self, shared: Path, work: WorkContext) -> Path:
        """Return the directory of the walks under ``shared``: built, or verified and reused.

        Raises:
            Interrupted: ``work`` is to stop; nothing half-built is left.
        """
        graph, section, built = self.graph, self._section, False
        work.say(
            "graph",
            f"{graph.n} vertices in {graph.num_blocks} blocks, {graph.adjacency.nnz:,} edges, {len(self.rules)} rules "
            f"({self._graph_seconds:.1f} s)",
        )

        def build_into(directory: Path) -> None:
            nonlocal built
            built = True
            self._write(directory, work)

        started = time.perf_counter()
        directory = cached(shared, f"walks-{self.key}", build_into, work)
        verb = "built" if built else "found and verified"
        work.say(
            "corpus",
            f"{section.num_walks:,} walks of {section.walk_length} {verb} as "
            f"{directory.parent.name}/{directory.name} ({time.perf_counter() - started:.1f} s)",
        )
        return directory

    def _write(self, directory: Path, work: WorkContext) -> None:
        section = self._section
        for name, stream, count, length in (
            ("train", _TRAIN, section.num_walks, section.walk_length),
            ("held_out", _HELD_OUT, section.gate.num_sequences, self._context + 1),
        ):
            with Meter(f"{name} walks", count, work.saying("corpus"), unit="") as meter:
                result = generate_walks(
                    self.graph,
                    self.rules,
                    count,
                    length,
                    self.stream_seed(stream),
                    should_stop=work.should_stop,
                    progress=meter.reach,
                )
            np.save(directory / f"{name}.npy", result.walks)
        save_npz(directory / "graph.npz", self.graph.adjacency)
        np.save(directory / "blocks.npy", self.graph.block_assignments)
        rules = [asdict(rule) for rule in self.rules]
        (directory / "rules.json").write_text(json.dumps(rules, indent=1) + "\n", encoding="utf-8")

    def open(self, directory: Path) -> None:
        """Map both sets of walks into memory.

        Raises:
            CorpusError: a file is no array of numbers.
        """
        self._directory = directory
        self.walks, self.held_out = self._load("train.npy"), self._load("held_out.npy")

    def _load(self, name: str) -> Walks:
        path = self._directory / name
        try:
            walks: Walks = np.load(path, mmap_mode="r", allow_pickle=False)
        except ValueError as error:
            # The digests hold, so nobody but who wrote it can have put this there.
            raise CorpusError(f"{path} is no array of numbers: not loaded, not run ({error})") from error
        return walks
