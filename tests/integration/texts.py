"""A text experiment that takes seconds, and the pipeline as users launch it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from harness import ROOT, Shown, environment, write_config

PIPELINE = ROOT / "scripts" / "train_pipeline.sh"

TINY_TEXT: dict[str, Any] = {
    "task": "text",
    "text": {"builtin_bytes": 60_000, "vocab_size": 400, "sample_tokens": 20},
    "model": {"d_model": 16, "n_layers": 1, "n_heads": 2, "max_seq_len": 32, "dropout": 0.1},
    "training": {"batch_size": 12, "learning_rate": 0.01, "max_epochs": 3, "log_interval": 10, "timeout_seconds": 60},
    "gate": {"val_loss_threshold": 5.9, "language_threshold": None, "loss_rises_threshold": None},
    "checkpoint": {"every_steps": 20, "keep_last": 2},
}
"""Some fifty steps an epoch."""


def tiny_text(directory: Path, *layers: dict[str, Any]) -> Path:
    """The configuration file of a tiny text run."""
    return write_config(directory / "tiny_text.yaml", TINY_TEXT, *layers)


def pipeline(*arguments: object, timeout: float = 200, **env: str | None) -> Shown:
    """Run ``scripts/train_pipeline.sh`` to its end."""
    done = subprocess.run(
        [str(PIPELINE), *map(str, arguments)],
        env=environment(**{"PYTHON": sys.executable, **env}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    return Shown(done.returncode, done.stdout, done.stderr)
