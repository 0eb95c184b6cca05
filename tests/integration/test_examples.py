"""The ready-made runs: their corpora obey every rule, and the quick one passes its gate."""

from __future__ import annotations

from pathlib import Path

import jsonschema
import numpy as np
import pytest
from harness import ROOT, record, run, run_dir, write_config

from accel_train.config.fields import to_dict
from accel_train.config.parse import parse_config
from accel_train.process.work import SILENT
from accel_train.runs.listing import load_sufficient_runs
from accel_train.runs.record import record_schema as load_schema
from accel_train.tasks.registry import config_class
from accel_train.tasks.walks.compliance import score
from accel_train.tasks.walks.task import WalksTask

EXAMPLES = sorted((ROOT / "examples").glob("walks_*.yaml"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_the_whole_corpus_obeys_every_rule(tmp_path: Path, example: Path) -> None:
    config, _ = parse_config(["--config", str(example)], config_class)
    task = WalksTask(config)
    task.check(SILENT)
    artifacts = Path(task.build(tmp_path, SILENT))
    walks = np.load(artifacts / "train.npy", mmap_mode="r")
    assert walks.shape == (config.walks.num_walks, config.walks.walk_length)
    found = score(walks, task.corpus.graph, task.corpus.rules)
    assert found.edge_checks == walks.shape[0] * (walks.shape[1] - 1)
    assert found.edge_compliance == 1.0
    assert found.rule_compliance == 1.0
    assert (found.checks_per_rule > 0).all(), "a rule that no walk meets cannot be learned"


def test_the_anchor_run_runs_when_shortened(tmp_path: Path, here) -> None:
    config, _ = parse_config(["--config", str(ROOT / "examples" / "walks_anchor.yaml")], config_class)
    shorter = {
        "output_dir": str(tmp_path / "out"),
        "walks": {"num_walks": 2000, "gate": {"num_sequences": 8, "min_rule_checks": 1}},
        "training": {"max_steps": 2, "batch_size": 4},
    }
    shown = here("train", "--config", write_config(tmp_path / "short.yaml", to_dict(config), shorter))
    assert shown.code == 0, shown.err
    assert record(tmp_path / "out")["metrics"]["scalars"]["steps_trained"] == 2


def test_the_quick_run_passes_its_gate_and_says_so(tmp_path: Path) -> None:
    output = run(ROOT / "examples" / "walks_quick.yaml", 1, "--output_dir", str(tmp_path), timeout=280)
    found = record(tmp_path)
    jsonschema.validate(found, load_schema())
    assert found["status"] == "completed"
    assert found["gate"]["passed"], found["gate"]["failure_reason"]
    assert "gate passed" in output
    assert found["metrics"]["scalars"]["final_edge_compliance"] > 0.95
    assert found["metrics"]["scalars"]["final_rule_compliance"] > 0.80
    assert [kept["experiment_id"] for kept in load_sufficient_runs(tmp_path)] == [run_dir(tmp_path).name]
