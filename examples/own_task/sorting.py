"""A task of one's own: learn to sort short lists of digits, and stop when nearly all held-out lists come out sorted.

Run it from the command line, like a built-in task:

    PYTHONPATH=examples/own_task accel-train train --config examples/own_task/sorting.yaml
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from annotated_types import Ge, Le
from torch import nn

from accel_train.config.fields import Count, Fraction, check, result_values, section
from accel_train.config.sections import ExperimentConfig
from accel_train.files.atomic import sha256_json
from accel_train.files.shared import cached
from accel_train.model.generation import generate
from accel_train.process.work import SILENT, StopCheck, WorkContext, never
from accel_train.tasks.base import Evaluation, GenerationOptions, Task
from accel_train.tasks.criteria import Criterion, judge

IGNORED = -100
"""A target that the loss leaves out."""


@section("sorting.gate")
class GateConfig:
    """When the model behaves."""

    accuracy_threshold: Fraction = 0.95
    """More than this share of the held-out lists must come out sorted."""
    stop_on_pass: bool = True
    """End training when the gate passes."""


@section("sorting")
class SortingConfig:
    """Lists of digits, and the same lists sorted."""

    length: Annotated[int, Ge(2), Le(64)] = 6
    """Digits in a list."""
    digits: Annotated[int, Ge(2), Le(1000)] = 10
    """Different digits; one more token separates a list from its sorted form."""
    num_train: Count = 20_000
    """Lists to train on."""
    num_held_out: Count = 500
    """Lists that the gate asks for."""
    gate: GateConfig = field(default_factory=GateConfig)
    """The gate."""

    @property
    def slug(self) -> str:
        """What the name of a run says of this section."""
        return f"n{self.length}"

    def check(self, config: ExperimentConfig) -> None:
        """Refuse a context that holds no list together with its sorted form."""
        context, needed = config.model.max_seq_len, 2 * self.length
        check(context >= needed, "sorting.length", self.length, f"needs model.max_seq_len >= {needed}, not {context}")


class Sequences:
    """``tokens`` ``(samples, 2 * length + 1)`` as inputs and targets; only sorted digits are targets."""

    def __init__(self, tokens: np.ndarray[Any, Any], length: int) -> None:
        self._tokens, self._length = tokens, length

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitems__(self, ids: np.ndarray[Any, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return inputs and targets, int64 ``(batch, 2 * length)`` each."""
        tokens = torch.from_numpy(self._tokens[ids].astype(np.int64))
        targets = tokens[:, 1:].clone()
        targets[:, : self._length] = IGNORED
        return tokens[:, :-1], targets


class Sorting(Task):
    """Learn to write a list of digits again, sorted."""

    name = "sorting"
    Config = SortingConfig
    headline: ClassVar = {"accuracy": "sorted"}
    columns: ClassVar = {"SORTED": "final_accuracy"}
    curves = ("accuracy",)
    advice: ClassVar = {"accuracy": "train longer, or on more lists (sorting.num_train)"}
    generation_options = frozenset({"num"})

    def __init__(self, config: ExperimentConfig) -> None:
        super().__init__(config)
        self._section: SortingConfig = config.section
        self._held_out: np.ndarray[Any, Any] = np.empty((0, 0), np.int64)

    @property
    def vocab_size(self) -> int:
        """Every digit, and the separator."""
        return self._section.digits + 1

    def build(self, shared: Path, work: WorkContext) -> str:
        """Draw both sets of lists once for all runs of the same section and seed; complete or absent."""
        key = sha256_json([dict(result_values(self._section)), self.config.seed])[:16]
        directory = cached(shared, f"sorting-{key}", self._write, work)
        work.say("corpus", f"{self._section.num_train:,} lists of {self._section.length} in {directory.name}")
        return str(directory)

    def _write(self, directory: Path) -> None:
        section, random = self._section, np.random.default_rng(self.config.seed)
        for name, count in (("train", section.num_train), ("held_out", section.num_held_out)):
            lists = random.integers(section.digits, size=(count, section.length), dtype=np.int64)
            separator = np.full((count, 1), section.digits)
            np.save(directory / f"{name}.npy", np.hstack([lists, separator, np.sort(lists, axis=1)]))

    def open(self, artifacts: str) -> Sequences:
        """Return the training lists, memory-mapped; opens the held-out ones as well."""
        self._held_out = np.load(Path(artifacts) / "held_out.npy", mmap_mode="r")
        return Sequences(np.load(Path(artifacts) / "train.npy", mmap_mode="r"), self._section.length)

    def evaluate(self, model: nn.Module, losses: Mapping[str, float], work: WorkContext) -> Evaluation:
        """Let the model sort every held-out list, and count those without a mistake."""
        written = self._sorted(model, self._held_out, work.should_stop)
        right = int((written == self._held_out).all(axis=1).sum())
        asked = [Criterion("accuracy", ">", self._section.gate.accuracy_threshold)]
        figures = {"accuracy": right / len(self._held_out)}
        return Evaluation(judge(asked, figures, evidence={"lists": len(self._held_out), "sorted": right}))

    def prepare_generation(self, checkpoint: Path, shared: Path) -> None:
        """Open the held-out lists, which are the prompts."""
        self.open(self.build(shared, SILENT))

    def generate(self, model: nn.Module, options: GenerationOptions) -> Iterator[str]:
        """Yield lists and what the model makes of them."""
        for row in self._sorted(model, self._held_out[: options.num or 5], never).tolist():
            yield f"{row[: self._section.length]} -> {row[self._section.length + 1 :]}\n"

    def _sorted(self, model: nn.Module, tokens: np.ndarray[Any, Any], stop: StopCheck) -> np.ndarray[Any, Any]:
        prompts = torch.from_numpy(np.array(tokens[:, : self._section.length + 1]))
        prompts = prompts.to(next(model.parameters()).device)
        return generate(model, prompts, tokens.shape[1], temperature=0.0, should_stop=stop).cpu().numpy()
