"""The benchmarks of the loop: the Trainer beside a hand-written loop, and beside other trainers.

All train the anchor model on the same batches' worth of tokens with AdamW, a cosine schedule and
clipping. They run in turns in one process; what starts a trainer up is not timed.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from accel_train.config.sections import ModelConfig, TrainingConfig
from accel_train.data.permutation import GlobalBatchSampler
from accel_train.model.size import count_parameters
from accel_train.model.transformer import TransformerLM
from accel_train.tasks.text.inference_cost import peak_rss_bytes
from accel_train.tasks.walks.dataset import WalkDataset
from accel_train.training.callbacks import Callback, LoopState
from accel_train.training.hooks import Hooks
from accel_train.training.loss_buffer import LossBuffer
from accel_train.training.plan import cosine_with_warmup, warmup_steps
from accel_train.training.trainer import Trainer

Figures = dict[str, Any]

ROOT = Path(__file__).resolve().parent.parent
VOCAB = 500
ANCHOR = ModelConfig()
TINY = ModelConfig(d_model=16, n_layers=2, n_heads=2, max_seq_len=32)
TINY_VOCAB = 100
SEED = 42
BATCH = 64


def random_dataset(samples: int, context: int, vocab_size: int) -> WalkDataset:
    """Random tokens: what they are changes no time."""
    tokens = np.random.default_rng(SEED).integers(vocab_size, size=(samples, context + 1), dtype=np.uint16)
    return WalkDataset(tokens, context)


def new_model(shape: ModelConfig, vocab_size: int) -> TransformerLM:
    torch.manual_seed(SEED)
    return TransformerLM(shape, vocab_size)


def flops_per_token(shape: ModelConfig, vocab_size: int) -> int:
    """Floating-point operations of the matrix products that training on one token takes, forward and backward.

    As PaLM (Chowdhery et al. 2022, appendix B) and nanoGPT count: six per weight of a matrix, and attention
    over the whole context, although half of it is masked.
    """
    width, layers = shape.d_model, shape.n_layers
    weights = layers * (4 * width * width + 2 * width * shape.feed_forward_width) + width * vocab_size
    return 6 * weights + 12 * layers * width * shape.max_seq_len


# -- overhead ------------------------------------------------------------------------------------


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronize() -> None:
    """Wait for the GPU, if there is one: before a clock is read."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


class BareLoop:
    """A training loop as one writes it by hand: the arithmetic, on batches that lie ready in the dataset.

    Args:
        model: its weights are trained.
        dataset: the samples.
        config: batch size and optimizer.
        total_steps: of the schedule.
        compiled: compile model and loss, as nanoGPT does; the name of the compiler, or None.
        bfloat16: compute in it, weights in float32, as nanoGPT does.
    """

    def __init__(
        self,
        model: nn.Module,
        dataset: WalkDataset,
        config: TrainingConfig,
        total_steps: int,
        *,
        compiled: str | None = None,
        bfloat16: bool = False,
    ) -> None:
        self.losses: list[torch.Tensor] = []
        model = model.to(DEVICE)

        def loss_of(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())

        self._loss_of: Any = torch.compile(loss_of, backend=compiled) if compiled else loss_of
        self._dataset, self._config, self._total = dataset, config, total_steps
        self._autocast = torch.autocast(DEVICE.type, torch.bfloat16, enabled=bfloat16)
        self._parameters = list(model.parameters())
        self._optimizer = torch.optim.AdamW(
            self._parameters, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay, fused=True
        )
        self._batches = iter(GlobalBatchSampler(len(dataset), config.batch_size, SEED))
        model.train()

    def run(self, steps: int) -> None:
        """Train ``steps`` more steps."""
        config, optimizer = self._config, self._optimizer
        warm_up = warmup_steps(config, self._total)
        for _ in range(steps):
            factor = cosine_with_warmup(len(self.losses), warm_up, self._total, config.min_lr_ratio)
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * factor
            inputs, targets = (self._on_device(part) for part in self._dataset.__getitems__(next(self._batches)))
            with self._autocast:
                loss = self._loss_of(inputs, targets)
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(self._parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            self.losses.append(loss.detach())

    @staticmethod
    def _on_device(part: torch.Tensor) -> torch.Tensor:
        return part if DEVICE.type == "cpu" else part.pin_memory().to(DEVICE, non_blocking=True)


class InTurns(Callback):
    """After every block of the trainer's steps runs as many of the other loop; keeps the seconds of both.

    Args:
        other: the other loop.
        block: steps of a turn.
        beside: a third contestant, called once in a round.
    """

    def __init__(self, other: BareLoop, block: int, beside: Callable[[], object] = lambda: None) -> None:
        self.ours: list[float] = []
        self.theirs: list[float] = []
        self.beside: list[float] = []
        self._other, self._block, self._beside = other, block, beside
        self._began = 0.0

    def on_step_end(self, state: LoopState) -> None:
        """Hand over at the end of a block."""
        if state.step % self._block:
            return
        synchronize()
        end = time.perf_counter()
        self._other.run(self._block)
        synchronize()
        now = time.perf_counter()
        self._beside()
        synchronize()
        if state.step > self._block:
            self.ours.append(end - self._began)
            self.theirs.append(now - end)
            self.beside.append(time.perf_counter() - now)
        self._began = time.perf_counter()


_SQUARES = [torch.empty(2048, 2048).normal_() for _ in range(3)]
_MULTIPLIED_FLOPS = 2 * 2048**3


def _multiplied() -> None:
    """One product of two large square matrices, into a third: the rate that the processor can reach."""
    torch.mm(_SQUARES[0], _SQUARES[1], out=_SQUARES[2])


def bench_overhead() -> Figures:
    """The Trainer to a hand-written loop of the same arithmetic (goals: 1.01 anchor, 1.05 at 10,000 parameters)."""
    anchor = _overhead(ANCHOR, VOCAB, block=10, rounds=14)
    tiny = _overhead(TINY, TINY_VOCAB, block=100, rounds=40)
    return {
        **anchor,
        **{f"small_{name}": value for name, value in tiny.items()},
        **_switched_off(anchor["bare_step_ms"]),
        "ratio_of": "median seconds of the Trainer's steps to those of the bare loop's, anchor model",
    }


def _overhead(shape: ModelConfig, vocab_size: int, *, block: int, rounds: int) -> Figures:
    steps = block * (rounds + 2)
    config = TrainingConfig(max_steps=steps, batch_size=64)
    dataset = random_dataset(steps * config.batch_size, shape.max_seq_len, vocab_size)
    bare = BareLoop(new_model(shape, vocab_size), dataset, config, steps)
    turns = InTurns(bare, block, _multiplied)
    model = new_model(shape, vocab_size)
    state = Trainer(model, dataset, config, seed=SEED, callbacks=[turns]).fit()
    ratios = sorted(ours / theirs for ours, theirs in zip(turns.ours, turns.theirs, strict=True))
    ours, theirs = statistics.median(turns.ours), statistics.median(turns.theirs)
    flops = flops_per_token(shape, vocab_size) * shape.max_seq_len * config.batch_size
    rate = _MULTIPLIED_FLOPS / statistics.median(turns.beside)
    return {
        "parameters": count_parameters(model),
        "gigaflops_of_a_step": flops / 1e9,
        "gigaflops_per_second": flops * block / ours / 1e9,
        "matrix_product_gigaflops_per_second": rate / 1e9,
        "fraction_of_matrix_product_rate": flops * block / ours / rate,
        "ratio": ours / theirs,
        "ratio_quartiles": [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]],
        "step_ms": 1e3 * ours / block,
        "bare_step_ms": 1e3 * theirs / block,
        "rounds": len(ratios),
        "losses_equal_bit_for_bit": state.train_loss == [float(loss) for loss in bare.losses],
    }


def _switched_off(step_ms: float) -> Figures:
    """What is done in every step for losses, callbacks and hooks that nobody asked for, as a part of a step."""
    buffer = LossBuffer(1000, 1, 1, lambda tensor: tensor, torch.device("cpu"))
    loss, positions, hooks = torch.zeros(()), np.arange(64), Hooks(nn.Identity(), {}, {})
    callbacks: list[Callable[[], None]] = []

    def record() -> None:
        buffer.add(loss, positions, positions)

    def switched_off() -> None:
        for call in callbacks:
            call()
        if hooks:
            raise AssertionError

    def microseconds(action: Callable[[], None], calls: int = 900) -> float:
        rounds = []
        for _ in range(9):
            began = time.perf_counter()
            for _ in range(calls):
                action()
            rounds.append(time.perf_counter() - began)
            buffer.collect()
        return 1e6 * statistics.median(rounds) / calls

    recording, nothing = microseconds(record), microseconds(switched_off)
    return {
        "loss_recording_us": recording,
        "loss_recording_percent_of_step": recording / (10 * step_ms),
        "callbacks_and_hooks_off_us": nothing,
        "callbacks_and_hooks_off_percent_of_step": nothing / (10 * step_ms),
    }


# -- scaling and memory --------------------------------------------------------------------------

WARM_UP = 5


class _StepClock(Callback):
    """Seconds between the end of step ``WARM_UP`` and the last one."""

    def __init__(self) -> None:
        self._began = self._ended = 0.0

    @property
    def seconds(self) -> float:
        return self._ended - self._began

    def on_step_end(self, state: LoopState) -> None:
        """Read the clock."""
        self._ended = time.perf_counter()
        if state.step == WARM_UP:
            self._began = self._ended


def bench_scaling(rounds: int = 3, steps: int = 45) -> Figures:
    """The anchor model on one process and on two, the machine's cores divided among them."""
    cores = os.cpu_count() or 1
    worlds = [1, 2]
    seconds: dict[int, list[float]] = {world: [] for world in worlds}
    losses: dict[int, list[float]] = {}
    for _ in range(rounds):
        for world in worlds:
            found = _launched("train", world, max(1, cores // world), steps)
            seconds[world].append(found["seconds"])
            losses[world] = found["losses"]
    tokens = BATCH * ANCHOR.max_seq_len * (steps - WARM_UP)
    rates = {world: tokens / statistics.median(each) for world, each in seconds.items()}
    return {
        "tokens_per_second": {
            f"{world} processes of {max(1, cores // world)} threads": rates[world] for world in worlds
        },
        "largest_difference_of_losses": max(abs(a - b) for a, b in zip(losses[1], losses[2], strict=True)),
        "ratio": rates[2] / rates[1],
        "ratio_of": "tokens/s of two processes to those of one, on the same cores",
    }


def bench_memory(steps: int = 25) -> Figures:
    """Peak resident memory of a process that trains the anchor model, beside one that runs the bare loop."""
    found = {
        name: _launched(name, 1, os.cpu_count() or 1, steps)["peak_rss_mb"] for name in ("nothing", "bare", "train")
    }
    large = _launched("train large", 1, os.cpu_count() or 1, steps)["peak_rss_mb"]
    return {
        "imports_only_mb": found["nothing"],
        "bare_loop_mb": found["bare"],
        "trainer_mb": found["train"],
        "trainer_on_100_times_the_data_mb": large,
        "ratio": found["train"] / found["bare"],
        "ratio_of": "peak resident memory of the Trainer's process to that of the bare loop's",
    }


def _launched(what: str, world: int, threads: int, steps: int) -> Figures:
    """Run :func:`_child` in ``world`` fresh processes; returns what the main one found."""
    line = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "accelerate_config.yaml"]
    line += ["--multi_gpu", "--num_processes", str(world)] if world > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "ACCELERATE_USE_CPU": "true"}
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "found.json"
        line += [__file__, what, str(steps), str(output)]
        done = subprocess.run(line, cwd=ROOT, env=environment, check=False, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{what} on {world} processes failed:\n{done.stderr[-2000:]}")
        figures: Figures = json.loads(output.read_text())
    return figures


def _child(what: str, steps: int, output: Path) -> None:
    figures: Figures = {}
    config = TrainingConfig(max_steps=steps, batch_size=BATCH)
    samples = BATCH * steps
    with tempfile.TemporaryDirectory() as directory:
        if what == "train large":
            # Written in pieces and memory-mapped: it never lies in this process's memory as a whole.
            tokens = np.lib.format.open_memmap(
                Path(directory) / "tokens.npy", "w+", np.uint16, (100 * samples, ANCHOR.max_seq_len + 1)
            )
            for start in range(0, len(tokens), samples):
                tokens[start : start + samples] = start % VOCAB
            tokens.flush()
            del tokens
            walks = np.load(Path(directory) / "tokens.npy", mmap_mode="r")
            dataset = WalkDataset(walks, ANCHOR.max_seq_len)
        else:
            dataset = random_dataset(samples, ANCHOR.max_seq_len, VOCAB)
        if what.startswith("train"):
            clock = _StepClock()
            state = Trainer(new_model(ANCHOR, VOCAB), dataset, config, seed=SEED, callbacks=[clock]).fit()
            figures = {"seconds": clock.seconds, "losses": state.train_loss}
        elif what == "bare":
            BareLoop(new_model(ANCHOR, VOCAB), dataset, config, steps).run(steps)
    if os.environ.get("RANK", "0") == "0":
        output.write_text(json.dumps({**figures, "peak_rss_mb": peak_rss_bytes() / 1e6}))


if __name__ == "__main__":
    _child(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
