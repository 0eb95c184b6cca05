"""The benchmark of trainers: the anchor model through ours and through those of others.

Every contestant is a process of its own, as its users start it; they train in turns (``bench_turns.py``).
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_loops import ANCHOR, BATCH, SEED, VOCAB, new_model, random_dataset
from bench_turns import Turns, in_turns
from torch import nn
from torch.nn import functional

from accel_train.config.sections import ModelConfig, TrainingConfig
from accel_train.tasks.walks.dataset import WalkDataset
from accel_train.training.callbacks import Callback, LoopState
from accel_train.training.losses import fused_cross_entropy
from accel_train.training.plan import cosine_with_warmup
from accel_train.training.trainer import Trainer

Figures = dict[str, Any]

OUR_MODEL = "_our_model"
"""Ends the names of loops of others around our model: they are shown, and are no peers."""


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


Contestant = Callable[[WalkDataset, Turns], None]
"""``run(dataset, turns)`` trains ``turns.steps`` steps and calls ``turns.step()`` after each."""


class _EndOfStep(Callback):
    def __init__(self, turns: Turns) -> None:
        self._turns = turns

    def on_step_end(self, state: LoopState) -> None:
        self._turns.step()


def _ours(dataset: WalkDataset, turns: Turns) -> None:
    config = TrainingConfig(max_steps=turns.steps, batch_size=BATCH)
    Trainer(our_model(), dataset, config, loss_fn=fused_cross_entropy, seed=SEED, callbacks=[_EndOfStep(turns)]).fit()


def _schedule(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine_with_warmup(step, steps // 10, steps))


def _adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.01, fused=True)


def _nanogpt(make_model: Callable[[], nn.Module], dataset: WalkDataset, turns: Turns) -> None:
    """As nanoGPT's train.py goes about it (github.com/karpathy/nanoGPT): windows from random places."""
    steps, model, context = turns.steps, make_model(), ANCHOR.max_seq_len
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
        turns.step()


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


def _minimal_accelerate(dataset: WalkDataset, turns: Turns) -> None:
    """The loop of Accelerate's quick tour."""
    from accelerate import Accelerator  # noqa: PLC0415

    accelerator, model = Accelerator(), plain_model()
    optimizer = _adamw(model)
    loader = torch.utils.data.DataLoader(_PyTorchDataset(dataset), batch_size=BATCH, shuffle=True, drop_last=True)
    model, optimizer, loader, scheduler = accelerator.prepare(
        model, optimizer, loader, _schedule(optimizer, turns.steps)
    )
    model.train()
    for inputs, targets in loader:
        loss = functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        turns.step()
        if turns.over:
            break


class _LossInside(nn.Module):
    """Our model as transformers' Trainer wants it: with the loss in its output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.model(input_ids)
        return {"loss": functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())}


def _transformers(make_model: Callable[[], nn.Module]) -> Contestant:
    def run(dataset: WalkDataset, turns: Turns) -> None:
        from transformers import Trainer as PeerTrainer  # noqa: PLC0415
        from transformers import TrainerCallback, TrainingArguments, default_data_collator  # noqa: PLC0415

        class Report(TrainerCallback):
            def on_step_end(self, *_args: Any, **_kwargs: Any) -> None:
                turns.step()

        with tempfile.TemporaryDirectory() as directory:
            arguments = TrainingArguments(
                output_dir=directory, max_steps=turns.steps, per_device_train_batch_size=BATCH, learning_rate=3e-4,
                weight_decay=0.01, max_grad_norm=1.0, lr_scheduler_type="cosine", warmup_steps=turns.steps // 10,
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


def _lightning(dataset: WalkDataset, turns: Turns) -> None:
    lightning: Any = importlib.import_module("lightning")

    class Module(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = plain_model()

        def training_step(self, batch: Any, _index: int) -> torch.Tensor:
            inputs, targets = batch
            return functional.cross_entropy(self.model(inputs).flatten(0, 1), targets.flatten())

        def configure_optimizers(self) -> Any:
            optimizer = _adamw(self.model)
            return [optimizer], [{"scheduler": _schedule(optimizer, turns.steps), "interval": "step"}]

        def on_train_batch_end(self, *_args: Any) -> None:
            turns.step()

    loader = torch.utils.data.DataLoader(_PyTorchDataset(dataset), batch_size=BATCH, shuffle=True, drop_last=True)
    trainer = lightning.Trainer(
        max_steps=turns.steps, gradient_clip_val=1.0, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=10, accelerator="auto", devices=1,
    )  # fmt: skip
    trainer.fit(Module(), loader)


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


def bench_peers(starts: int = 3, rounds: int = 4, block: int = 8) -> Figures:
    """The anchor model through other trainers, in turns (goals: 1.45 of transformers' Trainer, 1.05 of the fastest)."""
    steps = block * (rounds + 1)
    lines = {name: [sys.executable, __file__, name, str(steps), str(block)] for name in _contestants()}
    seconds: dict[str, list[float]] = {}
    # How a process's memory happens to lie moves its speed by several per cent: everyone is started several times.
    for _ in range(starts):
        for name, turns in in_turns(lines, rounds).items():
            seconds.setdefault(name, []).extend(turns)
    tokens = BATCH * ANCHOR.max_seq_len * block
    rates = {name: tokens / statistics.median(each) for name, each in seconds.items()}

    def ours_to(name: str) -> float:
        """Of our rate to another's, the median over the rounds."""
        if name not in seconds:
            return float("nan")
        return statistics.median(b / a for a, b in zip(seconds["accel_train"], seconds[name], strict=True))

    others = {name: ours_to(name) for name in seconds if name != "accel_train"}
    peers = {name: ratio for name, ratio in others.items() if not name.endswith(OUR_MODEL)}
    fastest = min(peers, key=peers.__getitem__)
    return {
        "tokens_per_second": rates,
        "ours_to": others,
        "spread": {name: max(each) / min(each) for name, each in seconds.items()},
        "starts": starts,
        "rounds": starts * rounds,
        "fastest": fastest,
        "to_fastest": peers[fastest],
        "to_fastest_loop_around_our_model": min(r for name, r in others.items() if name.endswith(OUR_MODEL)),
        "to_transformers": others.get("transformers"),
        "to_transformers_our_model": others.get(f"transformers{OUR_MODEL}"),
        "missing": sorted({"transformers", "lightning"} - set(seconds)),
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


def _main(name: str, steps: int, block: int) -> None:
    dataset = random_dataset(BATCH * steps, ANCHOR.max_seq_len, VOCAB)
    turns = Turns(steps, block, sys.stdin, sys.stdout)
    with _quiet():
        _contestants()[name](dataset, turns)


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
