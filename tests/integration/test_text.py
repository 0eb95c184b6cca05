"""The text task on one process and on two, and every example."""

from __future__ import annotations

from pathlib import Path

import jsonschema
import pytest
from harness import ROOT, merged, record, run_dir, write_config
from texts import tiny_text
from warm import fork

from accel_train.cli import parse_config
from accel_train.config import to_dict
from accel_train.record import load_schema

TEXTS = sorted(path for path in (ROOT / "examples").glob("*.yaml") if "task: text" in path.read_text())
NO_DROPOUT = {"model": {"dropout": 0.0}, "training": {"max_epochs": 2}, "gate": {"val_loss_threshold": None}}


def test_two_processes_take_the_samples_of_one_and_reach_its_losses(tmp_path: Path) -> None:
    found = {}
    for world in (1, 2):
        config = tiny_text(tmp_path / f"{world}", NO_DROPOUT, {"output_dir": str(tmp_path / f"out{world}")})
        fork(config, world)
        found[world] = record(tmp_path / f"out{world}")
    one, two = found[1], found[2]
    assert two["provenance"]["world_sizes"] == [2]
    assert one["provenance"]["data_fingerprint"] == two["provenance"]["data_fingerprint"]
    assert two["curves"]["train_loss"] == pytest.approx(one["curves"]["train_loss"], abs=1e-3)
    assert two["curves"]["val_loss"] == pytest.approx(one["curves"]["val_loss"], abs=1e-3)


@pytest.mark.parametrize("example", TEXTS, ids=lambda path: path.stem)
def test_every_example_runs_when_shortened(tmp_path: Path, here, example: Path) -> None:
    config, _ = parse_config(["--config", str(example)])
    as_it_is = to_dict(config)
    shorter = {
        "output_dir": str(tmp_path / "out"),
        "text": {"builtin_bytes": min(as_it_is["text"]["builtin_bytes"], 3_000_000), "val_batches": 1},
        "training": {"max_steps": 2, "eval_interval": None, "batch_size": 4, "gradient_accumulation_steps": 2},
        "gate": {"latency_p95_ms_threshold": None},
    }
    path = write_config(tmp_path / "short.yaml", merged(as_it_is, shorter))
    shown = here("train", "--config", path)
    assert shown.code == 0, shown.err
    found = record(tmp_path / "out")
    jsonschema.validate(found, load_schema())
    assert found["status"] == "completed"
    assert len(found["gate"]["criteria"]) >= 5
    assert (run_dir(tmp_path / "out") / "figures" / "training_curves.png").stat().st_size > 10_000
