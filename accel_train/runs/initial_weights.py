"""The weights that a run begins with: freshly drawn, or those of an earlier run."""

from __future__ import annotations

import hashlib
import textwrap
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model as load_weights

from accel_train.checkpoints.manifest import list_checkpoints, read_manifest, verify
from accel_train.config.sections import ExperimentConfig
from accel_train.errors import CheckpointError, ConfigError
from accel_train.files.atomic import sha256_file
from accel_train.model.transformer import TransformerLM
from accel_train.runs.directory import run_directory
from accel_train.runs.record import RECORD_FILE, read_record
from accel_train.tasks.base import Task

WEIGHTS = "model.safetensors"


def build_model(config: ExperimentConfig, task: Task, init: Path | None) -> TransformerLM:
    """A freshly initialised model (the same on every rank), or one with the weights of checkpoint ``init``.

    Raises:
        ConfigError: the weights do not fit the model.
        CheckpointError: they are no safetensors file.
    """
    torch.manual_seed(config.seed)
    model = TransformerLM(config.model, task.vocab_size)
    if init is not None:
        try:
            load_weights(model, init / WEIGHTS)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{init / WEIGHTS} cannot be loaded: {error}") from error
        except (RuntimeError, ValueError) as error:
            reason = textwrap.shorten(str(error), 300, placeholder=" ...")  # torch names every parameter
            rule = f"does not fit this model; make the model sections agree ({reason})"
            raise ConfigError("start.weights", str(init), rule) from error
    return model


def require_same_files(init: Path, task: Task) -> None:
    """Refuse weights that were learned with another tokenizer: as many ids say nothing about what they mean.

    Raises:
        ConfigError: a file of the task in checkpoint ``init`` is another than the task's; names both digests.
    """
    for name, content in task.files().items():
        path = init / name
        theirs, ours = sha256_file(path) if path.exists() else None, hashlib.sha256(content).hexdigest()
        if theirs not in {None, ours}:
            rule = f"was trained with the {name} of SHA-256 {theirs}, here is the one of SHA-256 {ours}; use its own"
            raise ConfigError("start.weights", str(init), rule)


def resolve_weights(config: ExperimentConfig, *, fresh: bool = False) -> tuple[Path | None, str]:
    """The checkpoint that ``start.weights`` names, and the digest of its weights.

    A named run that has checkpoints of its own keeps the digest that it started from, and needs
    the source no more: then the path is None.

    Raises:
        ConfigError: it is neither a sound checkpoint nor a completed run.
    """
    source = str(config.start.weights)
    own = run_directory(config)
    if config.name and not fresh and list_checkpoints(own / "checkpoints") and (own / RECORD_FILE).exists():
        earlier = read_record(own)
        if earlier.config["start"]["weights"] == source:
            return None, str(earlier.provenance.init_digest)
    path = Path(source)
    found = list_checkpoints(path / "checkpoints")
    if found and read_record(path).status != "completed":
        # Its newest checkpoint changes, and the identity of this run would change with it.
        rule = f"is a run that is not completed; let it end, or name one of its checkpoints, such as {found[-1][1]}"
    elif not path.is_dir():
        rule = "is not a directory; name a completed run or a checkpoint"
    else:
        checkpoint = found[-1][1] if found else path
        problems = verify(checkpoint)
        files = {} if problems else read_manifest(checkpoint)["files"]
        if WEIGHTS in files:
            return checkpoint, str(files[WEIGHTS]["sha256"])
        rule = f"holds no sound checkpoint ({'; '.join(problems) or WEIGHTS + ' is missing'}); name another"
    raise ConfigError("start.weights", source, rule)
