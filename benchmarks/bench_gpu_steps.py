"""The parts of ``bench_gpu.py`` that measure: the Trainer's step in a mode beside another loop's, and what trains.

The two loops are processes of their own that train in turns. Each keeps what it is: the Trainer with its deterministic
settings, the other with PyTorch's defaults; a compiled one beside a compiled one, bfloat16 beside bfloat16.

    bench_gpu_steps.py PART FILE [--dry]      writes the figures of a mode, gpt2, generate or gate to FILE
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from bench_loops import (
    ANCHOR,
    BATCH,
    DEVICE,
    SEED,
    VOCAB,
    BareLoop,
    flops_per_token,
    new_model,
    random_dataset,
    synchronize,
)
from bench_machine import machine
from bench_turns import Turns, in_turns

from accel_train.config.sections import ModelConfig, TrainingConfig
from accel_train.training import recorded_step
from accel_train.training.callbacks import Callback, LoopState
from accel_train.training.losses import fused_cross_entropy
from accel_train.training.trainer import Trainer

Figures = dict[str, Any]

ROOT = Path(__file__).resolve().parent.parent
GPT2 = ModelConfig(d_model=768, n_layers=12, n_heads=12, max_seq_len=1024, dropout=0.0, tie_embeddings=True)
GPT2_VOCAB = 50304
"""GPT-2's 50,257, rounded up to a multiple of 64 as nanoGPT does."""

PEAK_TERAFLOPS = {"H100 PCIe": 756.0, "H100": 989.0, "H200": 989.0, "A100": 312.0, "L4": 121.0, "RTX 4090": 165.0}
"""Dense bfloat16 matrix products, from the makers' data sheets; the first name found in the device's counts."""


@dataclass(frozen=True)
class Contest:
    """What the two loops train, and how.

    Args:
        shape: of the model.
        vocab_size: of the model.
        batch: sequences of a step.
        block: steps of a turn.
        rounds: turns of each.
        compiled: both models are compiled.
        bfloat16: both compute in bfloat16, with weights in float32.
        recorded: the Trainer's ``training.cuda_graph``. Its loss is the fused one, which both tasks train with.
        deterministic: the Trainer's.
    """

    shape: ModelConfig = ANCHOR
    vocab_size: int = VOCAB
    batch: int = BATCH
    block: int = 50
    rounds: int = 12
    compiled: bool = False
    bfloat16: bool = False
    recorded: bool = False
    deterministic: bool = True

    @property
    def steps(self) -> int:
        """Steps of each loop: a first block is not timed."""
        return self.block * (self.rounds + 1)


CONTESTS: Mapping[str, Contest] = {
    "kernel by kernel": Contest(),
    "recorded": Contest(recorded=True),
    "recorded, not deterministic": Contest(recorded=True, deterministic=False),
    "compiled": Contest(compiled=True),
    "compiled, recorded": Contest(compiled=True, recorded=True),
    "compiled, recorded, bfloat16": Contest(compiled=True, recorded=True, bfloat16=True),
    "gpt2": Contest(GPT2, GPT2_VOCAB, batch=16, block=10, rounds=6, compiled=True, recorded=True, bfloat16=True),
}


def small(contest: Contest) -> Contest:
    """Return the contest as ``--dry`` holds it: every branch of it, on a CPU, in seconds."""
    shape = replace(contest.shape, d_model=16, n_layers=2, n_heads=2, max_seq_len=16)
    return replace(contest, shape=shape, vocab_size=50, batch=8, block=2, rounds=2)


# -- the contestants -----------------------------------------------------------------------------


class _EndOfStep(Callback):
    def __init__(self, turns: Turns) -> None:
        self._turns = turns

    def on_step_end(self, state: LoopState) -> None:
        self._turns.step()


def train_ours(contest: Contest, turns: Turns, *, dry: bool) -> Figures:
    """Train with the Trainer; return what only its process knows."""
    os.environ.update({"ACCELERATE_MIXED_PRECISION": "bf16"} if contest.bfloat16 else {})
    # Dynamo without its compiler takes a second in place of a minute.
    os.environ.update({"ACCELERATE_DYNAMO_BACKEND": "eager" if dry else "inductor"} if contest.compiled else {})
    config = TrainingConfig(
        max_steps=contest.steps,
        batch_size=contest.batch,
        cuda_graph=contest.recorded,
        deterministic=contest.deterministic,
        log_interval=contest.block,
    )
    dataset = random_dataset(contest.steps * contest.batch, contest.shape.max_seq_len, contest.vocab_size)
    trainer = Trainer(
        new_model(contest.shape, contest.vocab_size),
        dataset,
        config,
        seed=SEED,
        callbacks=[_EndOfStep(turns)],
        loss_fn=fused_cross_entropy,
    )
    if dry:
        _stand_in_for_a_gpu(trainer)
    state = trainer.fit()
    replay = replay_seconds(trainer)
    if contest.recorded and replay is None:
        raise SystemExit("the step was not recorded; what the log says above is why")
    return {
        "replay_ms": None if replay is None else 1e3 * replay,
        "peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9 if DEVICE.type == "cuda" else None,
        "last_loss": state.train_loss[-1],
    }


def _stand_in_for_a_gpu(trainer: Trainer) -> None:
    """Let a CPU go the ways of a GPU: updates frozen on the device, and a graph that runs the recorded work again."""

    def capture(work: Callable[[], Any], device: torch.device) -> tuple[Any, Callable[[], None]]:
        outputs = tuple(tensor.clone() for tensor in work())

        def play_back() -> None:
            for place, value in zip(outputs, work(), strict=True):
                place.copy_(value)

        return outputs, play_back

    recorded_step.capture = capture  # type: ignore[attr-defined]
    trainer._step.freeze_on_device(trainer._optimizer.optimizer)


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


def train_theirs(contest: Contest, turns: Turns, *, dry: bool) -> Figures:
    """Train with a loop as one writes it by hand, with PyTorch's defaults."""
    if contest.shape == GPT2:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # as nanoGPT does
    config = TrainingConfig(max_steps=contest.steps, batch_size=contest.batch)
    dataset = random_dataset(contest.steps * contest.batch, contest.shape.max_seq_len, contest.vocab_size)
    model = new_model(contest.shape, contest.vocab_size)
    loop = BareLoop(
        model,
        dataset,
        config,
        contest.steps,
        compiled=("eager" if dry else "inductor") if contest.compiled else None,
        bfloat16=contest.bfloat16,
    )
    while not turns.over:
        loop.run(1)
        turns.step()
    return {
        "peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9 if DEVICE.type == "cuda" else None,
        "last_loss": float(loop.losses[-1]),
    }


CONTESTANTS = {"ours": train_ours, "theirs": train_theirs}


# -- the parts -----------------------------------------------------------------------------------


def measure(name: str, *, dry: bool) -> Figures:
    """Let both loops train in turns; return medians, and the ratio of ours to theirs."""
    contest = small(CONTESTS[name]) if dry else CONTESTS[name]
    with tempfile.TemporaryDirectory() as directory:
        files = {who: Path(directory) / who for who in CONTESTANTS}
        flags = ["--dry"] if dry else []
        lines = {who: [sys.executable, __file__, name, str(files[who]), "--as", who, *flags] for who in CONTESTANTS}
        seconds = in_turns(lines, contest.rounds)
        ours, theirs = (json.loads(files[who].read_text(encoding="utf-8")) for who in CONTESTANTS)
    step, other = (statistics.median(seconds[who]) / contest.block for who in CONTESTANTS)
    tokens = contest.batch * contest.shape.max_seq_len
    teraflops = flops_per_token(contest.shape, contest.vocab_size) * tokens / step / 1e12
    name_of_device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else ""
    peak = next((rate for known, rate in PEAK_TERAFLOPS.items() if known in name_of_device), None)
    replay = ours["replay_ms"]
    return {
        "mode": name,
        "machine": machine(),
        "ratio": step / other,
        "step_ms": 1e3 * step,
        "bare_step_ms": 1e3 * other,
        "replay_ms": replay,
        "step_to_replay": None if replay is None else 1e3 * step / replay,
        "tokens_per_second": tokens / step,
        "teraflops": teraflops,
        "utilisation": None if peak is None else teraflops / peak,
        "peak_memory_gb": ours["peak_memory_gb"],
        "bare_peak_memory_gb": theirs["peak_memory_gb"],
        "last_losses": [ours["last_loss"], theirs["last_loss"]],
    }


def measure_generation(*, dry: bool) -> Figures:
    """Greedy generation on the device beside transformers' ``generate``."""
    from bench import bench_generate  # noqa: PLC0415 - it imports every other benchmark

    return {"machine": machine(), **(bench_generate(num=20, rounds=1) if dry else bench_generate())}


def train_to_the_gate(*, dry: bool) -> Figures:
    """Train ``walks_anchor.yaml`` to its gate by the command line; the log shows the run."""
    with tempfile.TemporaryDirectory() as results:
        line = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "accelerate_config.yaml"]
        line += ["scripts/train.py", "--output_dir", results, "--config"]
        line += ["examples/walks_quick.yaml", "--training.max_steps", "20"] if dry else ["examples/walks_anchor.yaml"]
        line += ["--training.log_interval", "5" if dry else "500"]
        done = subprocess.run(line, cwd=ROOT, check=False)
        found = list(Path(results).glob("walks_*/result.json"))
        if len(found) != 1:
            raise SystemExit(f"the run ended with {done.returncode} and left no record")
        record = json.loads(found[0].read_text(encoding="utf-8"))
    scalars, timing, passed = record["metrics"]["scalars"], record["timing"], record["gate"]["passed"]
    return {
        "machine": machine(),
        "exit_code": done.returncode,
        "status": record["status"],
        "passed": passed,
        "seconds": timing["seconds"]["training"] if passed else None,
        "seconds_of": timing["seconds"],
        "epochs": scalars["epochs_trained"],
        "rule_compliance": scalars["final_rule_compliance"],
        "tokens_per_second": timing["tokens_per_second"],
    }


OTHERS: Mapping[str, Callable[..., Figures]] = {"generate": measure_generation, "gate": train_to_the_gate}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*CONTESTS, *OTHERS])
    parser.add_argument("file", type=Path, help="where the figures go")
    parser.add_argument("--dry", action="store_true", help="in small, on a CPU")
    parser.add_argument("--as", dest="contestant", choices=CONTESTANTS, help="be one of the two that train in turns")
    options = parser.parse_args()
    if options.contestant is not None:
        contest = small(CONTESTS[options.part]) if options.dry else CONTESTS[options.part]
        turns = Turns(contest.steps, contest.block, sys.stdin, sys.stdout)
        figures = CONTESTANTS[options.contestant](contest, turns, dry=options.dry)
    elif options.part in OTHERS:
        figures = OTHERS[options.part](dry=options.dry)
    else:
        figures = measure(options.part, dry=options.dry)
    temporary = options.file.with_suffix(".part")
    temporary.write_text(json.dumps(figures), encoding="utf-8")
    temporary.replace(options.file)


if __name__ == "__main__":
    main()
