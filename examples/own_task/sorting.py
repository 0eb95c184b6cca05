"""A task of one's own: learn to sort short lists of digits, and stop when nearly all held-out lists come out sorted.

Run it: PYTHONPATH=examples/own_task accel-train train --config examples/own_task/sorting.yaml
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

from accel_train.config.fields import Count, FractionBelowOne, check, section
from accel_train.config.sections import ExperimentConfig
from accel_train.files.atomic import sha256_file, sha256_json
from accel_train.files.shared import cached
from accel_train.model.generation import generate
from accel_train.process.work import SILENT, StopCheck, WorkContext, never
from accel_train.tasks.base import Evaluation, GenerationOptions, Task
from accel_train.tasks.criteria import Criterion, judge


@section("sorting.gate")
class GateConfig:
    """When the model behaves."""

    accuracy_threshold: FractionBelowOne = 0.95
    """More than this share of the held-out lists must come out sorted."""
    stop_on_pass: bool = True
    """End training when the gate passes."""


@section("sorting")
class SortingConfig:
    """Lists of digits, and the same lists sorted."""

    length: Annotated[int, Ge(2), Le(18)] = 6
    """Digits in a list."""
    digits: Annotated[int, Ge(2), Le(10)] = 10
    """Different digits; one more token separates a list from its sorted form."""
    num_train: Count = 20_000
    """Lists to train on."""
    num_held_out: Count = 500
    """Lists that the gate asks for; none of them is trained on."""
    gate: GateConfig = field(default_factory=GateConfig)
    """The gate."""

    @property
    def slug(self) -> str:
        """What the name of a run says of this section."""
        return f"n{self.length}"

    def check(self, config: ExperimentConfig) -> None:
        """Refuse a context that is too short, and more lists than there are."""
        context, needed = config.model.max_seq_len, 2 * self.length
        check(context >= needed, "sorting.length", self.length, f"needs model.max_seq_len >= {needed}, not {context}")
        all_lists, drawn = self.digits**self.length, self.num_train + self.num_held_out
        rule = f"and {self.num_held_out} held out are more than the {all_lists} different lists; use longer ones"
        check(drawn <= all_lists, "sorting.num_train", self.num_train, rule)


class Lists:
    """Rows of tokens, ``(lists, 2 * length + 1)``, as training samples: only the sorted digits are targets."""

    def __init__(self, rows: np.ndarray[Any, Any], length: int) -> None:
        self._rows, self._length = rows, length

    def __len__(self) -> int:
        return len(self._rows)

    def __getitems__(self, ids: np.ndarray[Any, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return inputs and targets, int64 ``(batch, 2 * length)`` each."""
        tokens = torch.from_numpy(self._rows[ids])
        targets = tokens[:, 1:].clone()
        targets[:, : self._length] = -100  # the loss leaves these out
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

    @property
    def vocab_size(self) -> int:
        """Every digit, and the separator."""
        return self._section.digits + 1

    def build(self, shared: Path, work: WorkContext) -> str:
        """Draw the lists once for all runs that need the same ones; the key names what they depend on."""
        own = self._section
        key = sha256_json([own.length, own.digits, own.num_train, own.num_held_out, self.config.seed])[:16]
        directory = cached(shared, f"sorting-{key}", self._write, work)
        work.say("corpus", f"{own.num_train:,} lists of {own.length} digits in {directory.name}")
        return str(directory)

    def _write(self, directory: Path) -> None:
        own, random = self._section, np.random.default_rng(self.config.seed)
        # Every list is a number, and none is drawn twice: what is held out is never trained on.
        numbers = random.choice(own.digits**own.length, own.num_train + own.num_held_out, replace=False)
        lists = numbers[:, None] // own.digits ** np.arange(own.length) % own.digits
        rows = np.hstack([lists, np.full((len(lists), 1), own.digits), np.sort(lists)])
        np.save(directory / "train.npy", rows[: own.num_train])
        np.save(directory / "held_out.npy", rows[own.num_train :])

    def open(self, artifacts: str) -> Lists:
        """Return the training lists, memory-mapped; the held-out ones are opened beside them."""
        self._directory = Path(artifacts)
        self._held_out = np.load(self._directory / "held_out.npy")
        return Lists(np.load(self._directory / "train.npy", mmap_mode="r"), self._section.length)

    def digests(self) -> dict[str, str]:
        """Return the SHA-256 of both sets: a resumed run goes on with the same lists or is refused."""
        return {name: sha256_file(self._directory / name) for name in ("train.npy", "held_out.npy")}

    def evaluate(self, model: nn.Module, losses: Mapping[str, float], work: WorkContext) -> Evaluation:
        """Let the model sort every held-out list, and count those without a mistake."""
        written = self._sorted(model, self._held_out, work.should_stop)
        right, asked = int((written == self._held_out).all(axis=1).sum()), len(self._held_out)
        criteria = [Criterion("accuracy", ">", self._section.gate.accuracy_threshold)]
        return Evaluation(judge(criteria, {"accuracy": right / asked}, evidence={"lists": asked, "sorted": right}))

    def prepare_generation(self, checkpoint: Path, shared: Path) -> None:
        """Open the held-out lists, which are the prompts."""
        self.open(self.build(shared, SILENT))

    def generate(self, model: nn.Module, options: GenerationOptions) -> Iterator[str]:
        """Yield held-out lists and what the model makes of them, a line each."""
        for row in self._sorted(model, self._held_out[: options.num or 5], never).tolist():
            yield f"{row[: self._section.length]} -> {row[self._section.length + 1 :]}\n"

    def _sorted(self, model: nn.Module, rows: np.ndarray[Any, Any], should_stop: StopCheck) -> np.ndarray[Any, Any]:
        prompts = torch.from_numpy(rows[:, : self._section.length + 1]).to(next(model.parameters()).device)
        return generate(model, prompts, rows.shape[1], temperature=0.0, should_stop=should_stop).cpu().numpy()
