"""The graph, its rules and the walks: a pure function of the configuration, built once and then shared."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from functools import cached_property
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
from accel_train.tasks.walks.config import WalksConfig
from accel_train.tasks.walks.generator import generate_walks
from accel_train.tasks.walks.graph import Graph, Rule, designate_rules, generate_graph

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
        self.directory = Path()
        """Where the walks lie; after :meth:`open`."""
        self.held_out: Walks = np.empty((0, 0), np.uint16)
        """Walks that the gate's prompts are the beginnings of; after :meth:`open`."""
        self.walks: Walks = np.empty((0, 0), np.uint16)
        """Walks for training; after :meth:`open`."""

    @cached_property
    def _drawn(self) -> tuple[Graph, tuple[Rule, ...], float]:
        """Graph, rules, and the seconds that they took."""
        started = time.perf_counter()
        graph = generate_graph(self._section.graph, self.stream_seed(_GRAPH))
        rules = designate_rules(graph, self._section.rules, self._context, self.stream_seed(_RULES))
        return graph, rules, time.perf_counter() - started

    @property
    def graph(self) -> Graph:
        """The graph, drawn at first use."""
        return self._drawn[0]

    @property
    def rules(self) -> tuple[Rule, ...]:
        """All rules of the graph."""
        return self._drawn[1]

    @property
    def scored_rules(self) -> tuple[Rule, ...]:
        """The rules whose jump can be seen inside the context.

        A jump is visible iff it is no longer than the context: when the token at the deadline is predicted, the
        jumper is then still among the tokens that the model sees.
        """
        return tuple(rule for rule in self.rules if rule.jump_length <= self._context)

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
        (graph, rules, seconds), section, built = self._drawn, self._section, False
        size = f"{graph.n} vertices in {graph.num_blocks} blocks, {graph.adjacency.nnz:,} edges"
        work.say("graph", f"{size}, {len(rules)} rules ({seconds:.1f} s)")

        def build_into(directory: Path) -> None:
            nonlocal built
            built = True
            self._write(directory, work)

        started = time.perf_counter()
        directory = cached(shared, f"walks-{self.key}", build_into, work)
        found = f"{'built' if built else 'found and verified'} as {directory.parent.name}/{directory.name}"
        took = f"{time.perf_counter() - started:.1f} s"
        work.say("corpus", f"{section.num_walks:,} walks of {section.walk_length} {found} ({took})")
        return directory

    def _write(self, directory: Path, work: WorkContext) -> None:
        section = self._section
        for name, stream, count, length in (
            ("train", _TRAIN, section.num_walks, section.walk_length),
            ("held_out", _HELD_OUT, section.gate.num_sequences, self._context + 1),
        ):
            with Meter(f"{name} walks", count, work.saying("corpus"), unit="") as meter:
                seed = self.stream_seed(stream)
                walks = generate_walks(
                    self.graph, self.rules, count, length, seed, should_stop=work.should_stop, progress=meter.reach
                ).walks
            np.save(directory / f"{name}.npy", walks)
        save_npz(directory / "graph.npz", self.graph.adjacency)
        np.save(directory / "blocks.npy", self.graph.block_assignments)
        rules = [asdict(rule) for rule in self.rules]
        (directory / "rules.json").write_text(json.dumps(rules, indent=1) + "\n", encoding="utf-8")

    def open(self, directory: Path) -> None:
        """Map both sets of walks into memory.

        Raises:
            CorpusError: a file is no array of numbers.
        """
        self.directory = directory
        self.walks, self.held_out = self._load("train.npy"), self._load("held_out.npy")

    def _load(self, name: str) -> Walks:
        path = self.directory / name
        try:
            walks: Walks = np.load(path, mmap_mode="r", allow_pickle=False)
        except ValueError as error:
            # The digests hold, so nobody but who wrote it can have put this there.
            raise CorpusError(f"{path} is no array of numbers: not loaded, not run ({error})") from error
        return walks
