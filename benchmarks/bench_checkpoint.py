"""The benchmarks of checkpoints: how long one holds training up, and how long a resume takes far into a run."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from accel_train.checkpoints.manifest import step_directory
from accel_train.checkpoints.state import TrainingState
from accel_train.config.sections import CheckpointConfig, ModelConfig, TrainingConfig
from accel_train.model.size import count_parameters
from accel_train.model.transformer import TransformerLM
from accel_train.ranks.accelerator import arithmetic, machine
from accel_train.training.losses import next_token_cross_entropy
from accel_train.training.trainer import Trainer

Figures = dict[str, Any]

ROOT = Path(__file__).resolve().parent.parent


class RandomTokens:
    """``samples`` sequences that are computed when they are asked for, so there may be any number of them."""

    def __init__(self, samples: int, length: int, vocab_size: int) -> None:
        self._samples, self._length, self._vocab_size = samples, length, vocab_size

    def __len__(self) -> int:
        return self._samples

    def __getitems__(self, ids: np.ndarray[Any, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """``(inputs, targets)`` of the samples ``ids``, each ``(len(ids), length)``."""
        steps = np.arange(1, self._length + 2)
        tokens = torch.from_numpy((np.asarray(ids)[:, None] * steps) % self._vocab_size)
        return tokens[:, :-1], tokens[:, 1:]


@contextmanager
def trained_one_step(model: TransformerLM, config: TrainingConfig, dataset: Any) -> Iterator[Trainer]:
    """A trainer with optimizer state, whose checkpointer can be measured, in a temporary run directory."""
    with tempfile.TemporaryDirectory() as directory:
        trainer = Trainer(model, dataset, config, run_dir=directory, checkpoint=CheckpointConfig(keep_last=1))
        trainer.fit()
        yield trainer


def bench_checkpoint() -> Figures:
    """The stall of a checkpoint: goals 0.4 of a synchronous verified save, anchor model 5 ms over save_state."""
    gpt2 = ModelConfig(d_model=768, n_layers=12, n_heads=12, max_seq_len=1024, tie_embeddings=True)
    large = _checkpoint_figures(gpt2, 50_257, rounds=6, length=128, batch=1)
    anchor = _checkpoint_figures(ModelConfig(), 500, rounds=15, length=64, batch=64)
    return {
        **large,
        **{f"anchor_{name}": value for name, value in anchor.items()},
        "anchor_stall_over_save_state_ms": 1e3 * (anchor["stall_seconds"] - anchor["save_state_seconds"]),
        "ratio_with_slowdown": (large["stall_seconds"] + large["slowdown_seconds"]) / large["synchronous_seconds"],
        "ratio": large["stall_seconds"] / large["synchronous_seconds"],
        "ratio_of": "the stall of a checkpoint of the large model to its synchronous verified save",
    }


def _checkpoint_figures(shape: ModelConfig, vocab_size: int, *, rounds: int, length: int, batch: int) -> Figures:
    config, model = TrainingConfig(max_steps=1, batch_size=batch), TransformerLM(shape, vocab_size)
    with trained_one_step(model, config, RandomTokens(1000, length, vocab_size)) as trainer:
        checkpointer, state, accelerator = trainer._commits._checkpointer, trainer.state, trainer.accelerator
        assert checkpointer is not None
        plain = checkpointer.directory / "plain"
        tokens = torch.randint(vocab_size, (batch, length + 1))

        def next_step() -> None:
            """As if trained on: another step is another checkpoint."""
            state.step += 1
            state.train_loss.append(0.0)

        def train_step() -> None:
            trainer.model.train()
            accelerator.backward(next_token_cross_entropy(trainer.model, (tokens[:, :-1], tokens[:, 1:])))
            trainer._optimizer.step()
            trainer._optimizer.zero_grad()

        def save_state() -> Figures:
            seconds = _seconds(lambda: accelerator.save_state(str(plain), safe_serialization=True))
            shutil.rmtree(plain)
            return {"save_state": seconds}

        def synchronous() -> Figures:
            next_step()
            return {"synchronous": _seconds(lambda: checkpointer.save(state)) + _seconds(checkpointer.wait)}

        def in_background() -> Figures:
            next_step()
            alone = _seconds(train_step)
            stall, beside = _seconds(lambda: checkpointer.save(state)), []
            commit = checkpointer._commit
            while commit is not None and not commit.done():
                beside.append(_seconds(train_step))
            checkpointer.wait()
            alone = min(alone, _seconds(train_step))
            # What the commit costs the steps that run beside it.
            return {"stall": stall, "slowdown": max(0.0, sum(beside) - len(beside) * alone), "step": alone}

        found: dict[str, list[float]] = {}
        ways = [save_state, synchronous, in_background]
        for round_number in range(rounds + 1):
            for way in ways[round_number % 3 :] + ways[: round_number % 3]:
                # The same before each: pages that a checkpoint has just given back, as after a rotation.
                save_state()
                os.sync()
                for name, seconds in way().items() if round_number else ():
                    found.setdefault(name, []).append(seconds)
        size = sum(file.stat().st_size for file in (checkpointer.directory / step_directory(state.step)).iterdir())
    return {
        "parameters": count_parameters(model),
        "checkpoint_mb": size / 1e6,
        **{f"{name}_seconds": statistics.median(values) for name, values in found.items()},
    }


def _seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


_SAMPLES, _POSITION, _BATCH = 10**10, 10**9, 1000
_FIRST_STEP = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
from bench_checkpoint import virtual_trainer
from accel_train.training.callbacks import Callback

class Report(Callback):
    def on_step_end(self, state):
        print(state.step, time.monotonic(), flush=True)
        os._exit(0)

virtual_trainer(sys.argv[2], callbacks=[Report()]).fit()
"""


def virtual_trainer(run_dir: str, **options: Any) -> Trainer:
    """A tiny model on 10 billion sequences that exist only when they are asked for."""
    model = TransformerLM(ModelConfig(d_model=16, n_layers=1, n_heads=2, max_seq_len=8), 100)
    config = TrainingConfig(max_epochs=1, batch_size=_BATCH)
    return Trainer(model, RandomTokens(_SAMPLES, 8, 100), config, run_dir=run_dir, **options)


def bench_resume() -> Figures:
    """Start of a process to its first step, at sample 1e9 of 1e10 and at sample 0 (goal: ratio at most 1.2)."""
    step = _POSITION // _BATCH

    def first_step(run_dir: str) -> float:
        start = time.monotonic()
        command = [sys.executable, "-c", _FIRST_STEP, str(Path(__file__).parent), run_dir]
        output = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
        assert int(output[-2]) == (step + 1 if run_dir == far else 1), output
        return float(output[-1]) - start

    seconds: dict[str, list[float]] = {"0": [], "1e9": []}
    with tempfile.TemporaryDirectory() as far:
        trainer = virtual_trainer(far)
        checkpointer = trainer._commits._checkpointer
        assert checkpointer is not None
        state = TrainingState(step=step, step_in_epoch=step, train_loss=[4.0] * step, tokens_seen=8 * _POSITION)
        state.arithmetic, state.machine = arithmetic(trainer.accelerator), machine(trainer.accelerator)
        checkpointer.save(state)
        checkpointer.wait()
        for round_number in range(6):
            with tempfile.TemporaryDirectory() as near:
                times = {"0": first_step(near), "1e9": first_step(far)}
            for position, value in times.items() if round_number else ():
                seconds[position].append(value)
    medians = {position: statistics.median(values) for position, values in seconds.items()}
    return {
        "samples": float(_SAMPLES),
        "seconds_at_0": medians["0"],
        "seconds_at_1e9": medians["1e9"],
        "ratio": medians["1e9"] / medians["0"],
        "ratio_of": "a resume at sample 1e9 (step 1e6) to a fresh start at sample 0",
    }
