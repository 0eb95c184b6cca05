#!/usr/bin/env python3
"""Benchmarks: ``benchmarks/bench.py NAME`` prints a table of figures, with ``--json`` one JSON object.

Competitors run in turns with our code in the same process, and medians are reported: on a
shared machine only such pairs can be compared.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import resource
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
from bench_gpu import bench_gpu
from bench_growth import bench_growth
from bench_loops import bench_memory, bench_overhead, bench_scaling
from bench_machine import machine
from bench_peers import bench_peers
from bench_text import bench_text

from accel_train.checkpoints.manifest import step_directory
from accel_train.checkpoints.state import TrainingState
from accel_train.config.sections import CheckpointConfig, GraphConfig, ModelConfig, RulesConfig, TrainingConfig
from accel_train.model.generation import generate
from accel_train.model.transformer import TransformerLM
from accel_train.ranks.accelerator import arithmetic
from accel_train.ranks.accelerator import machine as describe_machine
from accel_train.tasks.walks.compliance import Compliance, score
from accel_train.tasks.walks.generator import generate_walks
from accel_train.tasks.walks.graph import generate_graph
from accel_train.tasks.walks.rules import designate_rules
from accel_train.training.losses import next_token_cross_entropy
from accel_train.training.trainer import Trainer

Figures = dict[str, Any]

ROOT = Path(__file__).resolve().parent.parent


def median_seconds(rounds: int, **runs: Callable[[], object]) -> dict[str, float]:
    """Median seconds of each run over interleaved rounds, after one round of warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for round_number in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if round_number:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def bench_generate() -> Figures:
    """Greedy generation of 1000 sequences of 64 tokens with the anchor model (goal: at most 4 s)."""
    num, length, prompt_length, vocab_size = 1000, 64, 8, 500
    config = ModelConfig()
    torch.manual_seed(0)
    model = TransformerLM(config, vocab_size)
    prompts = torch.randint(vocab_size, (num, prompt_length))
    runs: dict[str, Callable[[], object]] = {"ours": lambda: generate(model, prompts, length)}
    if importlib.util.find_spec("transformers") is not None:
        from transformers import GPT2Config, GPT2LMHeadModel  # noqa: PLC0415  (slow to import, and optional)

        peer: Any = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=vocab_size,
                n_positions=config.max_seq_len,
                n_embd=config.d_model,
                n_layer=config.n_layers,
                n_head=config.n_heads,
                bos_token_id=None,
                eos_token_id=None,
                tie_word_embeddings=False,
            )
        )
        peer.eval()
        mask = torch.ones_like(prompts)
        options = {"max_length": length, "do_sample": False, "use_cache": True, "pad_token_id": 0}
        runs["transformers"] = lambda: peer.generate(prompts, attention_mask=mask, **options)
    seconds = median_seconds(9, **runs)
    figures: Figures = {
        "sequences": num,
        "length": length,
        "prompt_length": prompt_length,
        "parameters": model.num_parameters,
        "seconds": seconds["ours"],
        "tokens_per_second": num * (length - prompt_length) / seconds["ours"],
    }
    if "transformers" in seconds:
        figures["transformers_seconds"] = seconds["transformers"]
        figures["ratio"] = seconds["ours"] / seconds["transformers"]
        figures["ratio_of"] = "our seconds to those of transformers' generate with its cache"
    return figures


def bench_corpus() -> Figures:
    """A corpus of 200,000 walks of 256 on the anchor graph (goal: at most 4.8 s and 1 GB)."""
    num, length, original_seconds = 200_000, 256, 72.0
    context_length = ModelConfig().max_seq_len
    graph = generate_graph(GraphConfig(), seed=42)
    rules = designate_rules(graph, RulesConfig(), context_length, seed=42)
    result = generate_walks(graph, rules, 1, length, seed=0)

    def build() -> None:
        nonlocal result
        result = generate_walks(graph, rules, num, length, seed=42)

    seconds = median_seconds(3, build=build)["build"]
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    judged: list[Compliance] = []
    score_seconds = median_seconds(1, score=lambda: judged.append(score(result.walks, graph, rules)))["score"]
    return {
        "walks": num,
        "length": length,
        "seconds": seconds,
        "ratio": seconds / original_seconds,
        "ratio_of": "our seconds to the original generator's 72 s on this kind of machine",
        "peak_rss_mb": peak_kib * 1024 / 1e6,
        "acceptance": result.acceptance,
        "score_seconds": score_seconds,
        "edge_compliance": judged[-1].edge_compliance,
        "rule_compliance": judged[-1].rule_compliance,
        "rule_checks": judged[-1].rule_checks,
    }


def bench_startup() -> Figures:
    """Importing the configuration, and the command line's help (goal: each under 1 s)."""
    goal = 1.0
    seconds = median_seconds(
        5,
        interpreter=lambda: _python("-c", "pass"),
        import_config=lambda: _python("-c", "import accel_train.config.sections"),
        help=lambda: _python("-m", "accel_train.commands.main", "--help"),
        train_help=lambda: _python("-m", "accel_train.commands.main", "train", "--help"),
    )
    return {
        **{f"{name}_seconds": value for name, value in seconds.items()},
        "ratio": max(seconds.values()) / goal,
        "ratio_of": "the slowest of them to 1 s",
    }


def bench_train() -> Figures:
    """The default job, from nothing to a passed gate (goal: under 60 s)."""
    goal = 60.0
    seconds, records = [], []
    for _ in range(3):
        with tempfile.TemporaryDirectory() as results:
            start = time.perf_counter()
            _python(
                "-m", "accelerate.commands.launch", "--config_file", "accelerate_config.yaml", "scripts/train.py",
                "--config", "examples/walks_quick.yaml", "--output_dir", results,
            )  # fmt: skip
            seconds.append(time.perf_counter() - start)
            records.append(json.loads(next(Path(results).glob("walks_*/result.json")).read_text()))
    return {
        "seconds": statistics.median(seconds),
        "gate_passed": all(record["gate"]["passed"] for record in records),
        "epochs": records[-1]["metrics"]["scalars"]["epochs_trained"],
        "rule_compliance": records[-1]["metrics"]["scalars"]["final_rule_compliance"],
        "training_seconds": statistics.median(record["timing"]["seconds"]["training"] for record in records),
        "tokens_per_second": statistics.median(record["timing"]["tokens_per_second"] for record in records),
        "ratio": statistics.median(seconds) / goal,
        "ratio_of": "our seconds to the goal of 60 s",
    }


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
        checkpointer, state, accelerator = trainer._checkpointer, trainer.state, trainer.accelerator
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
            while not checkpointer.idle:
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
        "parameters": model.num_parameters,
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
sys.path.insert(0, "scripts")
from bench import virtual_trainer
from accel_train.training.callbacks import Callback

class Report(Callback):
    def on_step_end(self, state):
        print(state.step, time.monotonic(), flush=True)
        os._exit(0)

virtual_trainer(sys.argv[1], callbacks=[Report()]).fit()
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
        command = [sys.executable, "-c", _FIRST_STEP, run_dir]
        output = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
        assert int(output[-2]) == (step + 1 if run_dir == far else 1), output
        return float(output[-1]) - start

    seconds: dict[str, list[float]] = {"0": [], "1e9": []}
    with tempfile.TemporaryDirectory() as far:
        trainer = virtual_trainer(far)
        checkpointer = trainer._checkpointer
        assert checkpointer is not None
        state = TrainingState(step=step, step_in_epoch=step, train_loss=[4.0] * step, tokens_seen=8 * _POSITION)
        state.arithmetic, state.machine = arithmetic(trainer.accelerator), describe_machine(trainer.accelerator)
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


def _python(*arguments: str) -> None:
    """Run this interpreter from the repository's root, quietly; fail loudly."""
    subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, capture_output=True, text=True)


BENCHMARKS: dict[str, Callable[[], Figures]] = {
    "checkpoint": bench_checkpoint,
    "corpus": bench_corpus,
    "generate": bench_generate,
    "gpu": bench_gpu,
    "growth": bench_growth,
    "memory": bench_memory,
    "overhead": bench_overhead,
    "peers": bench_peers,
    "resume": bench_resume,
    "scaling": bench_scaling,
    "startup": bench_startup,
    "text": bench_text,
    "train": bench_train,
}


def table(figures: Figures) -> str:
    """Names and values in two aligned columns; a figure inside another is named after both."""
    lines = dict(_flat(figures))
    width = max(map(len, lines))
    return "\n".join(
        f"{name:<{width}}  {f'{value:,.3f}' if isinstance(value, float) else value}" for name, value in lines.items()
    )


def _flat(figures: Figures, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in figures.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}: ")
        else:
            yield prefix + name, value


def main() -> None:
    summaries = [f"  {name:<10} {(run.__doc__ or '').splitlines()[0]}" for name, run in BENCHMARKS.items()]
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="benchmarks:\n" + "\n".join(summaries),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", metavar="NAME", choices=BENCHMARKS, help="benchmark to run: " + ", ".join(BENCHMARKS))
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    arguments = parser.parse_args()
    figures = BENCHMARKS[arguments.name]()
    if arguments.json:
        print(json.dumps({"benchmark": arguments.name, **figures, "machine": machine()}, indent=2))
    else:
        print(table(figures))


if __name__ == "__main__":
    main()
