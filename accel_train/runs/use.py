"""A finished or unfinished run, used: its newest sound weights judged again, or made to write."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from accel_train.checkpoints.manifest import newest_sound, read_manifest, require_configuration, require_data
from accel_train.checkpoints.state import STATE_FILE
from accel_train.config.sections import SHARED_CORPORA, ExperimentConfig, config_hash
from accel_train.data.loader import DatasetWithIds
from accel_train.errors import CheckpointError, ConfigError, CorpusError, TokenizerError
from accel_train.model.generation import stream
from accel_train.model.transformer import TransformerLM
from accel_train.runs.directory import CONFIG_FILE, read_config
from accel_train.runs.initial_weights import build_model
from accel_train.runs.record import read_record
from accel_train.tasks.base import Task, Trained
from accel_train.tasks.registry import build_task
from accel_train.tasks.text.task import TextTask
from accel_train.tasks.text.tokenizer import TOKENIZER_FILE
from accel_train.tasks.walks.task import WalksTask
from accel_train.training.evaluation import Share, mean_loss
from accel_train.training.losses import fused_cross_entropy
from accel_train.training.progress import be_silent

__all__ = [
    "CheckpointError",
    "CorpusError",
    "TextOptions",
    "TokenizerError",
    "evaluate",
    "generate_text",
    "generate_walks",
    "load_model",
    "task_of",
]

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_LONGEST_CHARACTER = 4
"""Bytes, and so tokens, of a character."""


@dataclass(frozen=True)
class Run:
    """A run directory with a sound checkpoint."""

    path: Path
    config: ExperimentConfig
    checkpoint: Path
    step: int


def find_run(path: Path) -> Run:
    """The run in ``path`` with its newest sound checkpoint.

    Raises:
        ConfigError: there is no such run, or it has no checkpoint yet.
        CheckpointError: all its checkpoints are damaged, or the newest belongs to another configuration.
    """
    config = _config_of(path)
    checkpoint = newest_sound(path / "checkpoints")
    if checkpoint is None:
        raise ConfigError("RUN", str(path), "has no checkpoint yet; let it train first")
    started_from = read_record(path)["provenance"]["init_digest"] if config.training.init_from else None
    require_configuration(checkpoint, config_hash(config, started_from), "put the run's own checkpoints back")
    return Run(path, config, checkpoint, int(read_manifest(checkpoint)["step"]))


def task_of(run_dir: Path) -> str:
    """Name of the task of the run in ``run_dir``.

    Raises:
        ConfigError: there is no such run.
    """
    return _config_of(run_dir).task


def _config_of(path: Path) -> ExperimentConfig:
    if not (path / CONFIG_FILE).is_file():
        raise ConfigError("RUN", str(path), f"is not a run directory (it has no {CONFIG_FILE})")
    return read_config(path / CONFIG_FILE)


def load_model(run_dir: Path) -> tuple[TransformerLM, Task, int]:
    """The newest sound weights of a run, its task with the data opened, and their step.

    Raises:
        ConfigError: there is no such run, or it has no checkpoint yet.
        CheckpointError: all its checkpoints are damaged, or the newest belongs to another configuration.
    """
    run = find_run(run_dir)
    task = build_task(run.config)
    task.check(be_silent, _never)
    task.open(task.build(run_dir.parent / SHARED_CORPORA, be_silent, _never))
    require_data(saved_data(run.checkpoint), task.digests(), run.step, "judge a run that was trained on this")
    return _model_of(run, task), task, run.step


def evaluate(run_dir: Path) -> dict[str, Any]:
    """Judge the newest checkpoint of a run by its gate; returns the verdict as JSON values."""
    run = find_run(run_dir)
    model, task, step = load_model(run_dir)
    config = run.config
    alone = Share(0, 1, config.training.batch_size, lambda: None, lambda sums: [sums])
    device = next(model.parameters()).device
    losses = {
        name: mean_loss(model, DatasetWithIds(dataset), fused_cross_entropy, device, alone)
        for name, dataset in task.validation().items()
    }
    model.eval()
    evaluation = task.evaluate(model, losses, _never)
    trained = Trained(
        model, run.checkpoint, evaluation.to_dict(), read_record(run_dir)["gate"]["evidence"].get("epoch_losses", [])
    )
    return {"run": str(run_dir), "step": step, **(task.conclude(trained, _never) or evaluation).to_dict()}


def generate_walks(run_dir: Path, num: int) -> Iterator[str]:
    """``num`` greedy continuations of held-out prompts by the newest checkpoint of a run, a line each.

    Raises:
        ConfigError: the run has another task, or fewer prompts.
    """
    model, task, _ = load_model(run_dir)
    if not isinstance(task, WalksTask):
        raise ConfigError("RUN", str(run_dir), "is no run of the walks task")
    for walk in task.generate(model, num, 0.0):
        yield " ".join(map(str, walk)) + "\n"


@dataclass(frozen=True)
class TextOptions:
    """How a text is continued; None takes what the run's configuration says."""

    prompt: str | None = None
    num: int = 1
    max_tokens: int = 200
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0


def generate_text(run_dir: Path, options: TextOptions) -> Iterator[str]:
    """Continue a prompt ``num`` times with the newest checkpoint of a run, piece by piece as it is written.

    Needs the checkpoint only, not the corpus.

    Raises:
        ConfigError: the run has another task, or an option is out of range.
    """
    run = find_run(run_dir)
    text = run.config.text
    task = TextTask(run.config)
    task.use_tokenizer(run.checkpoint / TOKENIZER_FILE)
    model = _model_of(run, task)
    prompt = text.prompt if options.prompt is None else options.prompt
    ids = task.prompt_ids(prompt)
    if not ids:
        raise ConfigError("--prompt", prompt, "must not be empty: the model continues what is there")
    generator = torch.Generator(device=next(model.parameters()).device).manual_seed(options.seed)
    for _ in range(options.num):
        yield task.tokenizer.decode(ids)
        pending: list[int] = []
        for token in stream(
            model,
            ids,
            options.max_tokens,
            temperature=text.temperature if options.temperature is None else options.temperature,
            top_k=text.top_k if options.top_k is None else options.top_k,
            top_p=text.top_p if options.top_p is None else options.top_p,
            generator=generator,
        ):
            pending.append(token)
            piece = task.tokenizer.decode(pending)
            # The bytes of one character may come in several tokens.
            if not piece.endswith(REPLACEMENT) or len(pending) >= _LONGEST_CHARACTER:
                yield piece
                pending = []
        yield task.tokenizer.decode(pending) + "\n"


def saved_data(checkpoint: Path) -> dict[str, str]:
    """SHA-256 (hex) of the data that a checkpoint saw, by name."""
    found: dict[str, str] = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8")).get("data", {})
    return found


def _model_of(run: Run, task: Task) -> TransformerLM:
    return build_model(run.config, task, run.checkpoint).to(Accelerator().device)


def _never() -> bool:
    return False
