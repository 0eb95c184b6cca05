"""The text task on one process and on two, and every example."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from harness import ROOT, checkpoints, merged, metrics, record, run_dir, write_config
from texts import tiny_text
from warm import fork

from accel_train.config.fields import to_dict
from accel_train.config.parse import parse_config
from accel_train.errors import Interrupted
from accel_train.files.atomic import sha256_file
from accel_train.process.work import SILENT, WorkContext
from accel_train.runs.record import record_schema as load_schema
from accel_train.tasks.registry import config_class
from accel_train.tasks.text import preparation as preparation_module
from accel_train.tasks.text.preparation import Preparation
from accel_train.tasks.text.tokenizer import Kind, TextTokenizer, train_tokenizer

TEXTS = sorted(path for path in (ROOT / "examples").glob("*.yaml") if "task: text" in path.read_text())
NO_DROPOUT = {"model": {"dropout": 0.0}, "training": {"max_epochs": 2}, "text": {"gate": {"val_loss_threshold": None}}}


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
    layers = [NO_DROPOUT, {"training": {"max_steps": 2}, "text": {"gate": {"latency_p95_ms_threshold": None}}}]
    assert here("train", "--config", tiny_text(tmp_path, *layers), "--output_dir", tmp_path / "first").code == 0
    source = run_dir(tmp_path / "first")
    start = ["--start.weights", source]
    again = here("train", "--config", tiny_text(tmp_path, *layers), "--output_dir", tmp_path / "second", *start)
    assert again.code == 0, again.err

    config = tiny_text(tmp_path, *layers, {"text": {"builtin_bytes": 61_000}})
    shown = here("train", "--config", config, "--output_dir", tmp_path / "third", *start)
    assert shown.code == 2
    digest = sha256_file(checkpoints(tmp_path / "first")[-1] / "tokenizer.json")
    assert f"was trained with the tokenizer.json of SHA-256 {digest}, here is the one of SHA-256 " in shown.err


def test_a_stop_is_answered_while_the_tokenizer_library_merges(tmp_path: Path, monkeypatch) -> None:
    """It merges, for as long as it takes, without looking: here, again and again until it is allowed to end."""
    merging, released = threading.Event(), threading.Event()
    too_late = time.monotonic() + 20

    def merge(kind: Kind, texts: Iterable[str], vocab_size: int) -> TextTokenizer:
        read = list(texts)
        merging.set()
        while True:
            trained = train_tokenizer(kind, read, vocab_size)
            if released.is_set() or time.monotonic() > too_late:
                return trained

    monkeypatch.setattr(preparation_module, "train_tokenizer", merge)
    preparation = Preparation(parse_config(["--config", str(tiny_text(tmp_path))], config_class)[0])
    corpus = preparation.build_corpus(tmp_path, SILENT)
    try:
        with pytest.raises(Interrupted):
            preparation.build_tokenizer(corpus, tmp_path, WorkContext(should_stop=merging.is_set))
        assert not list(tmp_path.glob("*tokenizer-*/"))
    finally:
        released.set()


@pytest.mark.parametrize(
    ("example", "sizes"),
    [
        (
            "char",
            {
                "text": {"tokenizer": "char", "split": None, "val_fraction": None, "prompt": "The "},
                "model": {"n_layers": 4, "d_model": 256, "n_heads": 4, "d_ff": 1024, "max_seq_len": 256}
                | {"dropout": 0.1, "positions": "learned"},
                "training": {"batch_size": 16, "learning_rate": 3e-4, "weight_decay": 0.1, "betas": [0.9, 0.95]}
                | {"eval_interval": 200},
            },
        ),
        (
            "text_default",
            {
                "text": {"tokenizer": "bpe", "vocab_size": 8000, "temperature": 1.0, "top_k": None, "top_p": None},
                "model": {"n_layers": 2, "d_model": 128, "n_heads": 4, "d_ff": 256, "max_seq_len": 128},
                "training": {"batch_size": 32, "max_epochs": 20},
            },
        ),
    ],
)
def test_an_example_has_the_sizes_that_it_is_known_by(example: str, sizes: dict[str, dict[str, Any]]) -> None:
    config, _ = parse_config(["--config", str(ROOT / "examples" / f"{example}.yaml")], config_class)
    found = to_dict(config)
    assert {section: {name: found[section][name] for name in wanted} for section, wanted in sizes.items()} == sizes
    assert (config.text.split_by, config.text.held_out_fraction) == {
        "char": ("tail", 0.05), "text_default": ("blocks", 0.1)
    }[example]  # fmt: skip


NUMBER = {"type": "number"}
IDENTITY = {
    "run_id": {"type": "string", "minLength": 1},
    "config_hash": {"type": "string", "pattern": "^[0-9a-f]{64}$"},
    "git_commit": {"type": ["string", "null"]},
    "step": {"type": "integer", "minimum": 1},
}
LOGGED = {**IDENTITY, "epoch": NUMBER, "loss": NUMBER, "lr": NUMBER, "grad_norm": NUMBER}
EVALUATED = {**IDENTITY, "loss": NUMBER, "val_loss": NUMBER, "val_bits_per_byte": NUMBER, "sample": {"type": "string"}}


def test_characters_are_validated_every_so_many_steps_and_the_log_is_for_machines(tmp_path: Path) -> None:
    char = {"text": {"tokenizer": "char", "vocab_size": 8000}, "training": {"eval_interval": 30, "max_epochs": 1}}
    config = tiny_text(
        tmp_path, char, {"output_dir": str(tmp_path / "out"), "text": {"gate": {"val_loss_threshold": None}}}
    )
    fork(config, 1)
    lines = metrics(tmp_path / "out")
    for line in lines:
        kind = EVALUATED if "val_loss" in line else LOGGED
        jsonschema.validate(line, {"type": "object", "properties": kind, "required": list(kind)})
    last = record(tmp_path / "out")["metrics"]["scalars"]["steps_trained"]
    evaluated = [line["step"] for line in lines if "val_loss" in line]
    assert evaluated == sorted({*range(30, last + 1, 30), last})
    assert record(tmp_path / "out")["curves"]["evaluation_step"] == evaluated
    assert [line["step"] for line in lines if "val_loss" not in line] == list(range(10, last + 1, 10))


QUICK = {"text_quick", "text_default"}


@pytest.mark.parametrize(
    "example",
    [pytest.param(path, id=path.stem, marks=[] if path.stem in QUICK else [pytest.mark.slow]) for path in TEXTS],
)
def test_every_example_runs_when_shortened(tmp_path: Path, here, example: Path) -> None:
    config, _ = parse_config(["--config", str(example)], config_class)
    as_it_is = to_dict(config)
    # As it is where it stands for those of its size: its corpus must support its vocabulary.
    small = {"builtin_bytes": 500_000, "vocab_size": min(as_it_is["text"]["vocab_size"], 1000)}
    shorter = {
        "output_dir": str(tmp_path / "out"),
        "text": {
            **({} if example.stem == "text_default" else small),
            "val_batches": 1,
            "gate": {"latency_p95_ms_threshold": None},
        },
        "training": {"max_steps": 2, "eval_interval": None, "batch_size": 4, "gradient_accumulation_steps": 2},
    }
    path = write_config(tmp_path / "short.yaml", merged(as_it_is, shorter))
    shown = here("train", "--config", path)
    assert shown.code == 0, shown.err
    found = record(tmp_path / "out")
    jsonschema.validate(found, load_schema())
    assert found["status"] == "completed"
    assert len(found["gate"]["criteria"]) >= 5
    assert (run_dir(tmp_path / "out") / "figures" / "training_curves.png").stat().st_size > 10_000
