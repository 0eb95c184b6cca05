"""A finished or unfinished run, used: its newest sound weights judged again, or made to write."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from accel_train.checkpoints.manifest import newest_sound, read_manifest, require_configuration, require_data
from accel_train.checkpoints.state import STATE_FILE
from accel_train.config.identity import config_hash
from accel_train.config.sections import SHARED_CORPORA, ExperimentConfig
from accel_train.data.loader import DatasetWithIds
from accel_train.errors import ConfigError
from accel_train.model.generation import keep_recordings
from accel_train.model.transformer import TransformerLM
from accel_train.process.work import SILENT
from accel_train.runs.directory import CONFIG_FILE, read_config
from accel_train.runs.initial_weights import build_model
from accel_train.runs.record import read_record
from accel_train.tasks.base import GenerationOptions, Task, Trained
from accel_train.tasks.registry import build_task
from accel_train.training.evaluation import Share, mean_loss
from accel_train.training.losses import fused_cross_entropy


@dataclass(frozen=True)
class Run:
    """A run directory with a sound checkpoint."""

    config: ExperimentConfig
    task: Task
    checkpoint: Path
    step: int

    def model(self) -> TransformerLM:
        """Return the weights of the checkpoint, on Accelerate's device."""
        return build_model(self.config, self.task, self.checkpoint).to(Accelerator().device)


def find_run(path: Path) -> Run:
    """Return the run in ``path`` with its newest sound checkpoint.

    Raises:
        ConfigError: there is no such run, or it has no checkpoint yet.
        CheckpointError: all its checkpoints are damaged, or the newest belongs to another configuration.
    """
    if not (path / CONFIG_FILE).is_file():
        raise ConfigError("RUN", str(path), f"is not a run directory (it has no {CONFIG_FILE})")
    config = read_config(path / CONFIG_FILE)
    checkpoint = newest_sound(path / "checkpoints")
    if checkpoint is None:
        raise ConfigError("RUN", str(path), "has no checkpoint yet; let it train first")
    started_from = read_record(path).provenance.init_digest if config.start.weights else None
    require_configuration(checkpoint, config_hash(config, started_from), "put the run's own checkpoints back")
    return Run(config, build_task(config), checkpoint, int(read_manifest(checkpoint)["step"]))


def load_model(run_dir: str | Path) -> TransformerLM:
    """Return the newest sound weights of a run, on Accelerate's device; its data are not needed.

    Raises:
        ConfigError: there is no such run, or it has no checkpoint yet.
        CheckpointError: all its checkpoints are damaged, or the newest belongs to another configuration.
    """
    return find_run(Path(run_dir)).model()


def evaluate(run_dir: Path) -> dict[str, Any]:
    """Judge the newest checkpoint of a run by its gate; returns the verdict as JSON values.

    Raises:
        ConfigError: there is no such run, or it has no checkpoint yet.
        CheckpointError: no checkpoint can be used, or it saw other data than are there now.
    """
    run = find_run(run_dir)
    task = run.task
    task.check(SILENT)
    task.open(task.build(run_dir.parent / SHARED_CORPORA, SILENT))
    require_data(saved_data(run.checkpoint), task.digests(), run.step, "judge a run that was trained on this")
    model = run.model()
    alone = Share(run.config.training.batch_size)
    device = next(model.parameters()).device
    datasets = {name: DatasetWithIds(dataset) for name, dataset in task.validation().items()}
    losses = {name: mean_loss(model, each, fused_cross_entropy, device, alone) for name, each in datasets.items()}
    model.eval()
    epoch_losses = read_record(run_dir).gate.evidence.get("epoch_losses", [])
    with keep_recordings():
        evaluation = task.evaluate(model, losses, SILENT).to_dict()
        concluded = task.conclude(Trained(model, run.checkpoint, evaluation, epoch_losses), SILENT)
    verdict = evaluation if concluded is None else concluded.to_dict()
    return {"run": str(run_dir), "step": run.step, **verdict}


def generate(run_dir: Path, options: GenerationOptions) -> Iterator[str]:
    """Yield what the newest checkpoint of a run writes, piece by piece.

    Raises:
        ConfigError: there is no such run, or its task does not take an option.
        CheckpointError: no checkpoint can be used.
    """
    run = find_run(run_dir)
    task = run.task
    for name, value in options.given().items():
        if name not in task.generation_options:
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(option, value, f"is no option of the task of this run, which is {task.name}")
    task.prepare_generation(run.checkpoint, run_dir.parent / SHARED_CORPORA)
    yield from task.generate(run.model(), options)


def saved_data(checkpoint: Path) -> dict[str, str]:
    """Return the SHA-256 (hex) of the data that a checkpoint saw, by name."""
    return dict(json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8")).get("data", {}))
