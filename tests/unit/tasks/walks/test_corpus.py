"""Graph, rules and walks: built once, shared, and a function of the configuration."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from scipy.sparse import load_npz

from accel_train.errors import CorpusError, Interrupted
from accel_train.process.work import SILENT, WorkContext
from accel_train.tasks.walks.compliance import score
from accel_train.tasks.walks.config import GateConfig, GraphConfig, RulesConfig, WalksConfig
from accel_train.tasks.walks.corpus import BLIND, SAMPLED, WalkCorpus

CONTEXT = 16
SECTION = WalksConfig(
    num_walks=600,
    walk_length=34,
    graph=GraphConfig(n=40, K=4, p_in=0.5, p_out=0.15),
    rules=RulesConfig(jumpers_per_block=1, jump_lengths=(3, 4, 5)),
    gate=GateConfig(num_sequences=200, prompt_length=4),
)


def corpus(seed: int = 42, context: int = CONTEXT, **changes) -> WalkCorpus:
    return WalkCorpus(dataclasses.replace(SECTION, **changes), context, seed)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> WalkCorpus:
    """A corpus on disk that no test changes."""
    found = corpus()
    found.open(found.build(tmp_path_factory.mktemp("shared"), SILENT))
    return found


# -- what is built -------------------------------------------------------------------------


def test_the_corpora_obey_every_rule_and_are_independent(built):
    for walks in (built.walks, built.held_out):
        found = score(np.asarray(walks), built.graph, built.rules)
        assert found.edge_compliance == found.rule_compliance == 1.0
        assert found.rule_checks > 100
    train = {tuple(chunk) for row in np.asarray(built.walks) for chunk in (row[:17], row[17:])}
    assert not train & {tuple(row) for row in np.asarray(built.held_out)}


def test_walks_have_the_shapes_that_the_section_asks(built):
    assert (built.walks.shape, built.held_out.shape) == ((600, 34), (200, CONTEXT + 1))
    assert built.walks.dtype == built.held_out.dtype == np.uint16


def test_walks_are_mapped_and_not_loaded(built):
    assert isinstance(built.walks, np.memmap)


def test_graph_and_rules_lie_beside_the_walks(built):
    rules = json.loads((built.directory / "rules.json").read_text())
    assert rules == [dataclasses.asdict(rule) for rule in built.rules]
    assert (load_npz(built.directory / "graph.npz") != built.graph.adjacency).nnz == 0
    assert np.array_equal(np.load(built.directory / "blocks.npy"), built.graph.block_assignments)


def test_a_second_build_reuses_the_artifacts(tmp_path):
    said: list[str] = []
    first = corpus().build(tmp_path, SILENT)
    again = corpus().build(tmp_path, WorkContext(lambda phase, what: said.append(what)))
    assert again == first
    assert any("found and verified" in line for line in said)


def test_another_seed_builds_other_artifacts(tmp_path):
    assert corpus(seed=7).build(tmp_path, SILENT) != corpus().build(tmp_path, SILENT)


def test_an_interrupted_build_leaves_nothing(tmp_path):
    with pytest.raises(Interrupted):
        corpus().build(tmp_path, WorkContext(should_stop=lambda: True))
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


# -- what decides --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 7},
        {"context": 15},
        {"num_walks": 601},
        {"walk_length": 35},
        {"graph": dataclasses.replace(SECTION.graph, p_in=0.4)},
        {"rules": dataclasses.replace(SECTION.rules, jump_lengths=(3, 4))},
        {"gate": dataclasses.replace(SECTION.gate, num_sequences=201)},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_changes_the_walks_changes_the_key(changes):
    assert corpus(**changes).key != corpus().key


@pytest.mark.parametrize(
    "gate", [{"prompt_length": 5}, {"rule_threshold": 0.5}, {"stop_on_pass": False}], ids=lambda gate: next(iter(gate))
)
def test_how_a_model_is_judged_leaves_the_key(gate):
    assert corpus(gate=dataclasses.replace(SECTION.gate, **gate)).key == corpus().key


def test_scales_that_give_the_same_jumps_share_the_walks():
    by_scale = RulesConfig(jumpers_per_block=1, jump_scales=(0.25, 0.5))
    by_length = RulesConfig(jumpers_per_block=1, jump_lengths=(4, 8))
    assert corpus(rules=by_scale).key == corpus(rules=by_length).key


def test_a_rule_is_scored_up_to_the_context_length():
    jumps = (CONTEXT - 1, CONTEXT, CONTEXT + 1, 20)
    found = corpus(rules=RulesConfig(jumpers_per_block=1, jump_lengths=jumps))
    assert tuple(rule.jump_length for rule in found.rules) == jumps
    assert found.scored_rules == found.rules[:2]


def test_streams_of_random_numbers_differ_by_seed_and_use():
    seeds = {corpus(seed=seed).stream_seed(stream) for seed in (1, 2) for stream in (BLIND, SAMPLED)}
    assert len(seeds) == 4
    assert corpus().stream_seed(BLIND) == corpus().stream_seed(BLIND)


# -- what is refused -----------------------------------------------------------------------


class Trap:
    """Leaves a directory behind when somebody unpickles it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_in_the_place_of_walks_is_not_run(tmp_path):
    (tmp_path / "train.npy").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises(CorpusError, match=r"train\.npy is no array of numbers: not loaded, not run"):
        corpus().open(tmp_path)
    assert not (tmp_path / "sprung").exists()


def test_an_array_of_objects_is_not_loaded(tmp_path):
    np.save(tmp_path / "train.npy", np.array([{"a": 1}]), allow_pickle=True)
    with pytest.raises(CorpusError, match=r"train\.npy is no array of numbers"):
        corpus().open(tmp_path)
