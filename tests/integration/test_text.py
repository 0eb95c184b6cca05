"""The text task on one process and on two, and every example."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
from harness import ROOT, checkpoints, merged, record, run_dir, write_config
from texts import tiny_text
from warm import fork

from accel_train.cli import parse_config
from accel_train.config import to_dict
from accel_train.durable import sha256_file
from accel_train.interrupt import Interrupted
from accel_train.record import load_schema
from accel_train.text.preparation import Preparation
from accel_train.training.progress import be_silent

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


def test_weights_learned_with_another_tokenizer_are_refused(tmp_path: Path, here) -> None:
    """Of the same size, so that nothing else would notice."""
    layers = [NO_DROPOUT, {"training": {"max_steps": 2}, "gate": {"latency_p95_ms_threshold": None}}]
    assert here("train", "--config", tiny_text(tmp_path, *layers), "--output_dir", tmp_path / "first").code == 0
    source = run_dir(tmp_path / "first")
    start = ["--training.init_from", source]
    again = here("train", "--config", tiny_text(tmp_path, *layers), "--output_dir", tmp_path / "second", *start)
    assert again.code == 0, again.err

    config = tiny_text(tmp_path, *layers, {"text": {"builtin_bytes": 61_000}})
    shown = here("train", "--config", config, "--output_dir", tmp_path / "third", *start)
    assert shown.code == 2
    digest = sha256_file(checkpoints(tmp_path / "first")[-1] / "tokenizer.json")
    assert f"was trained with the tokenizer.json of SHA-256 {digest}, here is the one of SHA-256 " in shown.err


def test_a_stop_is_answered_while_the_tokenizer_library_merges(tmp_path: Path) -> None:
    """All text is read within a fraction of a second, and there are more merges than that."""
    config, _ = parse_config(["--config", str(tiny_text(tmp_path, {"text": {"builtin_bytes": 2_000_000}}))])
    preparation = Preparation(replace(config, text=replace(config.text, tokenizer="unigram", vocab_size=2000)))
    corpus = preparation.build_corpus(tmp_path, be_silent, lambda: False)
    begun = time.monotonic()
    with pytest.raises(Interrupted):
        preparation.build_tokenizer(corpus, tmp_path, be_silent, lambda: time.monotonic() > begun + 0.5)
    assert time.monotonic() < begun + 2
    assert not list(tmp_path.glob("*tokenizer-*/"))


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
