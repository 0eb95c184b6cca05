"""The benchmarks of a GPU: the anchor model's step in every mode, and a GPT-2 of 124 M parameters.

Every mode runs in a process of its own, since Accelerate decides once in a process. In each of them the
Trainer and a hand-written loop run in turns, and it is their ratio that is compared.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from bench_loops import DEVICE, SEED, BareLoop, InTurns, flops_per_token, new_model, random_dataset, synchronize
from bench_machine import machine

from accel_train.config.sections import ModelConfig, TrainingConfig
from accel_train.training.losses import fused_cross_entropy, next_token_cross_entropy
from accel_train.training.trainer import Trainer

Figures = dict[str, Any]

ANCHOR, ANCHOR_VOCAB = ModelConfig(), 500
GPT2 = ModelConfig(d_model=768, n_layers=12, n_heads=12, max_seq_len=1024, dropout=0.0, tie_embeddings=True)
GPT2_VOCAB = 50304
"""GPT-2's 50,257, rounded up to a multiple of 64 as nanoGPT does."""

COMPILED = {"ACCELERATE_DYNAMO_BACKEND": "inductor"}
BFLOAT16 = {"ACCELERATE_MIXED_PRECISION": "bf16"}
MODES: Mapping[str, tuple[dict[str, str], bool]] = {
    "kernel by kernel": ({}, False),
    "recorded": ({}, True),
    "compiled": (COMPILED, False),
    "compiled, recorded": (COMPILED, True),
    "compiled, recorded, bfloat16": ({**COMPILED, **BFLOAT16}, True),
}
"""Environment of the process, and ``training.cuda_graph``."""

PEAK_TERAFLOPS = {"H100 PCIe": 756.0, "H100": 989.0, "H200": 989.0, "A100": 312.0, "L4": 121.0, "RTX 4090": 165.0}
"""Dense bfloat16 matrix products, from the makers' data sheets; the first name found in the device's counts."""


def bench_gpu() -> Figures:
    """Anchor model in every mode and a 124 M GPT-2 in bfloat16, on a GPU (goals: 4 x, 1.05, 45 %, 1.0)."""
    if DEVICE.type != "cuda":
        raise SystemExit("bench.py: gpu needs a CUDA device, and there is none here; see benchmarks/bench_gpu.sh")
    modes = {name: _in_process("anchor", *mode) for name, mode in MODES.items()}
    gpt2 = _in_process("gpt2", {**COMPILED, **BFLOAT16}, True)
    fastest = min((m for m in modes if "bfloat16" not in m), key=lambda name: modes[name]["ratio"])
    peak = next((rate for name, rate in PEAK_TERAFLOPS.items() if name in torch.cuda.get_device_name()), None)
    return {
        "device": torch.cuda.get_device_name(),
        "modes": modes,
        "fastest_mode": fastest,
        "to_bare_loop": 1 / modes[fastest]["ratio"],
        "step_to_replay": modes[fastest]["step_to_replay"],
        "gpt2": gpt2,
        "gpt2_to_nanogpt_style": 1 / gpt2["ratio"],
        "anchor_utilisation": _utilisation(modes["compiled, recorded, bfloat16"], peak),
        "gpt2_utilisation": _utilisation(gpt2, peak),
    }


def _utilisation(figures: Figures, peak: float | None) -> float | None:
    """Model FLOPs utilisation: arithmetic of the model a second, of what the device's matrix units can do."""
    return None if peak is None else figures["teraflops"] / peak


def _in_process(what: str, environment: dict[str, str], recorded: bool) -> Figures:
    line = [sys.executable, __file__, what, str(int(recorded))]
    done = subprocess.run(line, env={**os.environ, **environment}, check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{what} with {environment} failed:\n{done.stderr[-3000:]}")
    figures: Figures = json.loads(done.stdout.splitlines()[-1])
    return figures


def _child(what: str, recorded: bool) -> Figures:
    if what == "anchor":
        return measure(ANCHOR, ANCHOR_VOCAB, batch=64, block=50, rounds=12, recorded=recorded)
    return measure(GPT2, GPT2_VOCAB, batch=16, block=10, rounds=6, recorded=recorded, as_nanogpt=True)


def measure(
    shape: ModelConfig,
    vocab_size: int,
    *,
    batch: int,
    block: int,
    rounds: int,
    recorded: bool,
    as_nanogpt: bool = False,
) -> Figures:
    """The Trainer and a hand-written loop in turns; compiled and in bfloat16 like nanoGPT's if ``as_nanogpt``."""
    steps = block * (rounds + 2)
    config = TrainingConfig(max_steps=steps, batch_size=batch, cuda_graph=recorded, log_interval=block)
    dataset = random_dataset(steps * batch, shape.max_seq_len, vocab_size)
    other = new_model(shape, vocab_size)
    bare = BareLoop(other, dataset, config, steps, compiled=as_nanogpt, bfloat16=as_nanogpt)
    turns = InTurns(bare, block)
    loss_fn: Callable[..., torch.Tensor] = fused_cross_entropy if as_nanogpt else next_token_cross_entropy
    trainer = Trainer(new_model(shape, vocab_size), dataset, config, seed=SEED, callbacks=[turns], loss_fn=loss_fn)
    state = trainer.fit()
    ours, theirs = statistics.median(turns.ours) / block, statistics.median(turns.theirs) / block
    tokens = batch * shape.max_seq_len
    replay = replay_seconds(trainer)
    return {
        "ratio": ours / theirs,
        "step_ms": 1e3 * ours,
        "bare_step_ms": 1e3 * theirs,
        "replay_ms": None if replay is None else 1e3 * replay,
        "step_to_replay": None if replay is None else ours / replay,
        "tokens_per_second": tokens / ours,
        "teraflops": flops_per_token(shape, vocab_size) * tokens / ours / 1e12,
        "peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9 if DEVICE.type == "cuda" else None,
        "last_losses": [state.train_loss[-1], float(bare.losses[-1])],
    }


def replay_seconds(trainer: Trainer, times: int = 100) -> float | None:
    """A recorded step alone, again and again; None where none was recorded. What the trainer learned is lost."""
    recorded = trainer._step._recorded
    if recorded is None:
        return None
    rounds = []
    for _ in range(5):
        synchronize()
        began = time.perf_counter()
        for _ in range(times):
            recorded._replay()
        synchronize()
        rounds.append((time.perf_counter() - began) / times)
    return statistics.median(rounds)


def table(found: Figures) -> str:
    """The figures of :func:`bench_gpu` for people, as Markdown."""
    rows = {**found["modes"], "GPT-2 124 M, compiled, recorded, bfloat16": found["gpt2"]}
    lines = [
        f"{found['device']}",
        "",
        "| mode | step, ms | hand-written loop, ms | ratio | replay alone, ms | tokens/s | TFLOP/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, figures in rows.items():
        replay = "" if figures["replay_ms"] is None else f"{figures['replay_ms']:.3f}"
        lines.append(
            f"| {name} | {figures['step_ms']:.3f} | {figures['bare_step_ms']:.3f} | {figures['ratio']:.3f} | {replay} "
            f"| {figures['tokens_per_second']:,.0f} | {figures['teraflops']:.1f} |"
        )
    ratios = {
        "anchor model, tokens/s to the uncompiled hand-written loop": found["to_bare_loop"],
        "anchor model, step to the replay alone": found["step_to_replay"],
        "anchor model, model FLOPs utilisation": found["anchor_utilisation"],
        "GPT-2 124 M, model FLOPs utilisation": found["gpt2_utilisation"],
        "GPT-2 124 M, tokens/s to a nanoGPT-style loop": found["gpt2_to_nanogpt_style"],
    }
    lines += ["", *(f"* {what}: {'unknown' if value is None else f'{value:.3f}'}" for what, value in ratios.items())]
    return "\n".join(lines)


def gate(results: Path) -> Figures:
    """What the one run in ``results`` came to: seconds of its training until the gate passed.

    Raises:
        SystemExit: there is no finished run, or not one.
    """
    found = list(results.glob("walks_*/result.json"))
    if len(found) != 1:
        raise SystemExit(f"bench_gpu.py: {results} holds {len(found)} finished runs, not one")
    record = json.loads(found[0].read_text(encoding="utf-8"))
    scalars, timing = record["metrics"]["scalars"], record["timing"]
    passed = record["gate"]["passed"]
    return {
        "status": record["status"],
        "passed": passed,
        "seconds": timing["seconds"]["training"] if passed else None,
        "seconds_of": timing["seconds"],
        "epochs": scalars["epochs_trained"],
        "rule_compliance": scalars["final_rule_compliance"],
        "tokens_per_second": timing["tokens_per_second"],
        "machine": machine(),
    }


if __name__ == "__main__":
    if sys.argv[1] == "table":
        print(table(json.loads(Path(sys.argv[2]).read_text())))
    elif sys.argv[1] == "gate":
        print(json.dumps(gate(Path(sys.argv[2]))))
    else:
        print(json.dumps(_child(sys.argv[1], sys.argv[2] == "1")))
