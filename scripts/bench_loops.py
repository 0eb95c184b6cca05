"""The benchmarks of the loop: the Trainer beside a hand-written loop, and beside other trainers.

All train the anchor model on the same batches' worth of tokens with AdamW, a cosine schedule and
clipping. They run in turns in one process; what starts a trainer up is not timed.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from accel_train.config import ModelConfig, TrainingConfig
from accel_train.data.order import GlobalBatchSampler
from accel_train.data.windows import WalkDataset
from accel_train.model.transformer import TransformerLM
from accel_train.tasks.deployment import peak_rss_bytes
from accel_train.training.callbacks import Callback, LoopState
from accel_train.training.hooks import Hooks
from accel_train.training.ledger import Ledger
from accel_train.training.losses import fused_cross_entropy
from accel_train.training.schedule import cosine_with_warmup, warmup_steps
from accel_train.training.trainer import Trainer

Figures = dict[str, Any]

ROOT = Path(__file__).resolve().parent.parent
VOCAB = 500
ANCHOR = ModelConfig()
TINY = ModelConfig(d_model=16, n_layers=2, n_heads=2, max_seq_len=32)
TINY_VOCAB = 100
SEED = 42


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
        compiled: compile the model, as nanoGPT does.
        bfloat16: compute in it, weights in float32, as nanoGPT does.
    """

    def __init__(
        self,
        model: nn.Module,
        dataset: WalkDataset,
        config: TrainingConfig,
        total_steps: int,
        *,
        compiled: bool = False,
        bfloat16: bool = False,
    ) -> None:
        self.losses: list[torch.Tensor] = []
        model = model.to(DEVICE)
        self._model: Any = torch.compile(model) if compiled else model
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
        model, config, optimizer = self._model, self._config, self._optimizer
        warm_up = warmup_steps(config, self._total)
        for _ in range(steps):
            factor = cosine_with_warmup(len(self.losses), warm_up, self._total, config.min_lr_ratio)
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * factor
            inputs, targets = (self._on_device(part) for part in self._dataset.__getitems__(next(self._batches)))
            with self._autocast:
                loss = functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(self._parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            self.losses.append(loss.detach())

    @staticmethod
    def _on_device(part: torch.Tensor) -> torch.Tensor:
        return part if DEVICE.type == "cpu" else part.pin_memory().to(DEVICE, non_blocking=True)


class InTurns(Callback):
    """After every block of the trainer's steps runs as many of the other loop; keeps the seconds of both."""

    def __init__(self, other: BareLoop, block: int) -> None:
        self.ours: list[float] = []
        self.theirs: list[float] = []
        self._other, self._block = other, block
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
        if state.step > self._block:
            self.ours.append(end - self._began)
            self.theirs.append(now - end)
        self._began = time.perf_counter()


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
    turns = InTurns(bare, block)
    model = new_model(shape, vocab_size)
    state = Trainer(model, dataset, config, seed=SEED, callbacks=[turns]).fit()
    ratios = sorted(ours / theirs for ours, theirs in zip(turns.ours, turns.theirs, strict=True))
    ours, theirs = statistics.median(turns.ours), statistics.median(turns.theirs)
    return {
        "parameters": model.num_parameters,
        "ratio": ours / theirs,
        "ratio_quartiles": [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]],
        "step_ms": 1e3 * ours / block,
        "bare_step_ms": 1e3 * theirs / block,
        "rounds": len(ratios),
        "losses_equal_bit_for_bit": state.train_loss == [float(loss) for loss in bare.losses],
    }


def _switched_off(step_ms: float) -> Figures:
    """What is done in every step for losses, callbacks and hooks that nobody asked for, as a part of a step."""
    ledger = Ledger(1000, 1, 1, lambda tensor: tensor, torch.device("cpu"))
    loss, positions, hooks = torch.zeros(()), np.arange(64), Hooks(nn.Identity(), {}, {})
    callbacks: list[Callable[[], None]] = []

    def record() -> None:
        ledger.enter(loss, positions, positions)

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
            ledger.settle()
        return 1e6 * statistics.median(rounds) / calls

    recording, nothing = microseconds(record), microseconds(switched_off)
    return {
        "loss_recording_us": recording,
        "loss_recording_percent_of_step": recording / (10 * step_ms),
        "callbacks_and_hooks_off_us": nothing,
        "callbacks_and_hooks_off_percent_of_step": nothing / (10 * step_ms),
    }


class PlainGPT(nn.Module):
    """The anchor model as one writes it in plain PyTorch, after nanoGPT's layout: what users of other loops train.

    Its weights are initialised as :class:`TransformerLM`'s are, and it computes the same logits.
    """

    def __init__(self, shape: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.heads = shape.n_heads
        ours: Any = new_model(shape, vocab_size)
        self.tokens, self.positions = ours.token_embedding, ours.position_embedding
        self.blocks: Any = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm1": block.attention_norm,
                    "qkv": block.attention.qkv,
                    "output": block.attention.output,
                    "norm2": block.feed_forward_norm,
                    "up": block.feed_forward.up,
                    "gelu": nn.GELU(approximate="tanh"),
                    "down": block.feed_forward.output,
                }
            )
            for block in ours.blocks
        )
        self.norm, self.head = ours.final_norm, ours.head

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits ``(batch, time, vocab)`` of the token after each of ``tokens``, int64 ``(batch, time)``."""
        batch, time = tokens.shape
        x = self.tokens(tokens) + self.positions(torch.arange(time, device=tokens.device))
        for block in self.blocks:
            q, k, v = block["qkv"](block["norm1"](x)).split(x.shape[2], dim=2)
            q, k, v = (part.view(batch, time, self.heads, -1).transpose(1, 2) for part in (q, k, v))
            mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + block["output"](mixed.transpose(1, 2).contiguous().view(x.shape))
            x = x + block["down"](block["gelu"](block["up"](block["norm2"](x))))
        logits: torch.Tensor = self.head(self.norm(x))
        return logits


def plain_model() -> nn.Module:
    """The anchor model in plain PyTorch."""
    return PlainGPT(ANCHOR, VOCAB)


def our_model() -> nn.Module:
    """The anchor model as this package has it."""
    return new_model(ANCHOR, VOCAB)


# -- peers ---------------------------------------------------------------------------------------

OUR_MODEL = "_our_model"
WARM_UP = 5
BATCH = 64

Contestant = Callable[[WalkDataset, int], float]
"""``run(dataset, steps)`` trains from nothing and returns the seconds of the steps after :data:`WARM_UP`."""


class _Clock:
    """Seconds between the end of step ``WARM_UP`` and the last one."""

    def __init__(self, steps: int) -> None:
        self._steps, self._done, self._began, self.seconds = steps, 0, 0.0, 0.0

    def step(self) -> None:
        self._done += 1
        if self._done == WARM_UP:
            self._began = time.perf_counter()
        if self._done == self._steps:
            self.seconds = time.perf_counter() - self._began


class _StepClock(_Clock, Callback):
    def on_step_end(self, state: LoopState) -> None:
        self.step()


def _ours(dataset: WalkDataset, steps: int) -> float:
    clock = _StepClock(steps)
    config = TrainingConfig(max_steps=steps, batch_size=BATCH)
    Trainer(our_model(), dataset, config, loss_fn=fused_cross_entropy, seed=SEED, callbacks=[clock]).fit()
    return clock.seconds


def _schedule(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine_with_warmup(step, steps // 10, steps))


def _adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.01, fused=True)


def _nanogpt(make_model: Callable[[], nn.Module], dataset: WalkDataset, steps: int) -> float:
    """As nanoGPT's train.py goes about it (github.com/karpathy/nanoGPT): windows from random places."""
    clock, model, context = _Clock(steps), make_model(), ANCHOR.max_seq_len
    optimizer, data = _adamw(model), dataset._chunks.reshape(-1)
    model.train()

    def get_batch() -> tuple[torch.Tensor, torch.Tensor]:
        starts = torch.randint(len(data) - context - 1, (BATCH,)).tolist()
        x = torch.stack([torch.from_numpy(data[i : i + context].astype(np.int64)) for i in starts])
        y = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + context].astype(np.int64)) for i in starts])
        return x, y

    x, y = get_batch()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-4 * cosine_with_warmup(step, steps // 10, steps)
        logits = model(x)
        loss = functional.cross_entropy(logits.view(-1, logits.size(-1)), y.view(-1), ignore_index=-1)
        x, y = get_batch()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 10 == 0:
            loss.item()
        clock.step()
    return clock.seconds


class _PyTorchDataset(torch.utils.data.Dataset[Any]):
    """The same samples one by one, as a user's dataset gives them."""

    def __init__(self, dataset: WalkDataset, as_dict: bool = False) -> None:
        self._tokens = dataset._chunks.reshape(-1, dataset.context_length + 1)
        self._as_dict = as_dict

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, index: int) -> Any:
        tokens = torch.from_numpy(self._tokens[index].astype(np.int64))
        if self._as_dict:
            # What is shifted inside the model or its loss.
            return {"input_ids": tokens[:-1], "labels": tokens[:-1]}
        return tokens[:-1], tokens[1:]


def _minimal_accelerate(dataset: WalkDataset, steps: int) -> float:
    """The loop of Accelerate's quick tour."""
    from accelerate import Accelerator  # noqa: PLC0415

    clock, accelerator, model = _Clock(steps), Accelerator(), plain_model()
    optimizer = _adamw(model)
    loader = torch.utils.data.DataLoader(_PyTorchDataset(dataset), batch_size=BATCH, shuffle=True, drop_last=True)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, _schedule(optimizer, steps))
    model.train()
    for inputs, targets in loader:
        loss = functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        clock.step()
        if clock.seconds:
            break
    return clock.seconds


class _LossInside(nn.Module):
    """Our model as transformers' Trainer wants it: with the loss in its output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.model(input_ids)
        return {"loss": functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())}


def _transformers(make_model: Callable[[], nn.Module]) -> Contestant:
    def run(dataset: WalkDataset, steps: int) -> float:
        from transformers import Trainer as PeerTrainer  # noqa: PLC0415
        from transformers import TrainerCallback, TrainingArguments, default_data_collator  # noqa: PLC0415

        clock = _Clock(steps)

        class Report(TrainerCallback):
            def on_step_end(self, *_args: Any, **_kwargs: Any) -> None:
                clock.step()

        with tempfile.TemporaryDirectory() as directory:
            arguments = TrainingArguments(
                output_dir=directory, max_steps=steps, per_device_train_batch_size=BATCH, learning_rate=3e-4,
                weight_decay=0.01, max_grad_norm=1.0, lr_scheduler_type="cosine", warmup_steps=steps // 10,
                optim="adamw_torch_fused", logging_steps=10, save_strategy="no", report_to=[], disable_tqdm=True,
                use_cpu=not torch.cuda.is_available(), remove_unused_columns=False,
            )  # fmt: skip
            PeerTrainer(
                model=make_model(),
                args=arguments,
                train_dataset=_PyTorchDataset(dataset, as_dict=True),
                data_collator=default_data_collator,
                callbacks=[Report()],
            ).train()
        return clock.seconds

    return run


def _gpt2() -> nn.Module:
    """The model that transformers itself has of the anchor's shape and number of parameters."""
    from transformers import GPT2Config, GPT2LMHeadModel  # noqa: PLC0415

    torch.manual_seed(SEED)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB, n_positions=ANCHOR.max_seq_len, n_embd=ANCHOR.d_model, n_layer=ANCHOR.n_layers,
            n_head=ANCHOR.n_heads, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None,
            eos_token_id=None, tie_word_embeddings=False, use_cache=False,
        )
    )  # fmt: skip


def _lightning(dataset: WalkDataset, steps: int) -> float:
    import lightning  # noqa: PLC0415

    clock = _Clock(steps)

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = plain_model()

        def training_step(self, batch: Any, _index: int) -> torch.Tensor:
            inputs, targets = batch
            return functional.cross_entropy(self.model(inputs).flatten(0, 1), targets.flatten())

        def configure_optimizers(self) -> Any:
            optimizer = _adamw(self.model)
            return [optimizer], [{"scheduler": _schedule(optimizer, steps), "interval": "step"}]

        def on_train_batch_end(self, *_args: Any) -> None:
            clock.step()

    loader = torch.utils.data.DataLoader(_PyTorchDataset(dataset), batch_size=BATCH, shuffle=True, drop_last=True)
    trainer = lightning.Trainer(
        max_steps=steps, gradient_clip_val=1.0, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, log_every_n_steps=10, accelerator="auto", devices=1,
    )  # fmt: skip
    trainer.fit(Module(), loader)
    return clock.seconds


def _contestants() -> dict[str, Contestant]:
    found: dict[str, Contestant] = {
        "accel_train": _ours,
        "nanogpt_style": partial(_nanogpt, plain_model),
        "nanogpt_style_our_model": partial(_nanogpt, our_model),
        "minimal_accelerate": _minimal_accelerate,
    }
    if importlib.util.find_spec("transformers") is not None:
        found["transformers"] = _transformers(_gpt2)
        found["transformers_our_model"] = _transformers(lambda: _LossInside(our_model()))
    if importlib.util.find_spec("lightning") is not None:
        found["lightning"] = _lightning
    return found


def bench_peers(rounds: int = 5, steps: int = 35) -> Figures:
    """The anchor model through other trainers, in turns (goals: 1.45 of transformers' Trainer, 1.05 of the fastest)."""
    contestants = _contestants()
    dataset = random_dataset(BATCH * steps, ANCHOR.max_seq_len, VOCAB)
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    with _quiet():
        for number in range(rounds):
            # Another one begins each round: what runs first finds another machine than what runs last.
            for name in names[number % len(names) :] + names[: number % len(names)]:
                seconds[name].append(contestants[name](dataset, steps))
    tokens = BATCH * ANCHOR.max_seq_len * (steps - WARM_UP)
    rates = {name: tokens / statistics.median(each) for name, each in seconds.items()}
    # A loop of others around our model is shown, and is no peer.
    peers = {name: rate for name, rate in rates.items() if name != "accel_train" and not name.endswith(OUR_MODEL)}
    fastest = max(peers, key=peers.__getitem__)
    ours = rates["accel_train"]
    return {
        "tokens_per_second": rates,
        "spread": {name: max(each) / min(each) for name, each in seconds.items()},
        "rounds": rounds,
        "fastest": fastest,
        "to_fastest": ours / peers[fastest],
        "to_fastest_loop_around_our_model": ours / max(r for name, r in rates.items() if name.endswith(OUR_MODEL)),
        "to_transformers": ours / rates["transformers"] if "transformers" in rates else None,
        "to_transformers_our_model": ours / rates.get("transformers_our_model", float("nan")),
        "missing": sorted({"transformers", "lightning"} - set(contestants)),
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress lines and hints of other trainers."""
    loggers = [logging.getLogger(name) for name in ("lightning", "lightning.pytorch", "transformers", "accelerate")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


# -- scaling and memory --------------------------------------------------------------------------


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
            clock = _StepClock(steps)
            state = Trainer(new_model(ANCHOR, VOCAB), dataset, config, seed=SEED, callbacks=[clock]).fit()
            figures = {"seconds": clock.seconds, "losses": state.train_loss}
        elif what == "bare":
            BareLoop(new_model(ANCHOR, VOCAB), dataset, config, steps).run(steps)
    if os.environ.get("RANK", "0") == "0":
        output.write_text(json.dumps({**figures, "peak_rss_mb": peak_rss_bytes() / 1e6}))


if __name__ == "__main__":
    _child(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
