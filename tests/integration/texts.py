"""A text experiment that takes seconds, and the pipeline as users launch it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import warm
from harness import ROOT, Shown, environment, wait_for, write_config

PIPELINE = ROOT / "scripts" / "train_pipeline.sh"
FORKED = ROOT / "tests" / "faults" / "faulty_pipeline.py"
"""Without a fault in its environment, the pipeline."""

TINY_TEXT: dict[str, Any] = {
    "task": "text",
    "text": {
        "builtin_bytes": 60_000,
        "vocab_size": 400,
        "sample_tokens": 20,
        "gate": {"val_loss_threshold": 5.9, "language_threshold": None, "loss_rises_threshold": None},
    },
    "model": {"d_model": 16, "n_layers": 1, "n_heads": 2, "max_seq_len": 32, "dropout": 0.1},
    "training": {"batch_size": 12, "learning_rate": 0.01, "max_epochs": 3, "log_interval": 10, "timeout_seconds": 60},
    "checkpoint": {"every_steps": 20, "keep_last": 2},
}
"""Some fifty steps an epoch."""


def tiny_text(directory: Path, *layers: dict[str, Any]) -> Path:
    """The configuration file of a tiny text run."""
    return write_config(directory / "tiny_text.yaml", TINY_TEXT, *layers)


def pipeline(*arguments: object, fresh: bool = False, timeout: float = 200, **env: str | None) -> Shown:
    """Run the pipeline to its end, without the seconds of importing torch.

    ``fresh``, or with environment variables: as users launch it, by ``scripts/train_pipeline.sh``. Otherwise stdout
    and stderr come as one.
    """
    if not fresh and not env:
        with tempfile.NamedTemporaryFile("r") as output:
            code = warm.run_ranks(
                [str(FORKED), *map(str, arguments)], [environment()], Path(output.name), timeout=timeout
            )
            printed = output.read()
        return Shown(code, printed, printed)
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


def signalled_in_training(out: Path, number: int, *options: object) -> str:
    """Send ``number`` to the pipeline and all its processes once there is a checkpoint; returns the output."""
    process = subprocess.Popen(
        [str(PIPELINE), *map(str, options)],
        env=environment(PYTHON=sys.executable),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    wait_for(lambda: list(out.glob("*/checkpoints/step_*")), "the first checkpoint")
    os.killpg(process.pid, number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    return output
