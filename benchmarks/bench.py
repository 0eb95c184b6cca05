#!/usr/bin/env python3
"""Benchmarks: ``benchmarks/bench.py NAME`` prints a table of figures, with ``--json`` one JSON object.

Whatever is compared runs in turns on the same machine, and medians are reported: on a shared
machine only such pairs can be compared.

What each file measures:

  bench.py             generation, a corpus of walks, start-up, the default job to its gate
  bench_checkpoint.py  the stall of a checkpoint; a resume at sample 1e9
  bench_loops.py       the Trainer beside a hand-written loop; two processes; peak memory
  bench_peers.py       the Trainer beside other trainers
  bench_growth.py      time and memory of the rest at 1, 10 and 100 times the size
  bench_text.py        the text task: steps, tokenization, generation in a process of its own
  bench_gpu.sh         everything on a GPU, in parts (bench_gpu.py): tests, the step in every mode, generation
  bench_turns.py       no benchmark: processes that train in turns
  bench_machine.py     no benchmark: the machine and the versions that figures depend on
  bench_report.py      ``make bench``: all of them, beside their targets, into docs/benchmarks.md
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from bench_checkpoint import bench_checkpoint, bench_resume
from bench_growth import bench_growth
from bench_loops import DEVICE, bench_memory, bench_overhead, bench_scaling, synchronize
from bench_machine import machine
from bench_peers import bench_peers
from bench_text import bench_text

from accel_train.config.sections import ModelConfig
from accel_train.model.generation import generate
from accel_train.model.size import count_parameters
from accel_train.model.transformer import TransformerLM
from accel_train.tasks.walks.compliance import Compliance, score
from accel_train.tasks.walks.config import GraphConfig, RulesConfig
from accel_train.tasks.walks.generator import generate_walks
from accel_train.tasks.walks.graph import designate_rules, generate_graph

Figures = dict[str, Any]

ROOT = Path(__file__).resolve().parent.parent


def median_seconds(rounds: int, **runs: Callable[[], object]) -> dict[str, float]:
    """Median seconds of each run over interleaved rounds, after one round of warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for round_number in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            synchronize()
            if round_number:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def bench_generate(num: int = 1000, rounds: int = 9) -> Figures:
    """Greedy generation of 1000 sequences of 64 tokens with the anchor model (goal: at most 4 s)."""
    length, prompt_length, vocab_size = 64, 8, 500
    config = ModelConfig()
    torch.manual_seed(0)
    model = TransformerLM(config, vocab_size).to(DEVICE)
    prompts = torch.randint(vocab_size, (num, prompt_length)).to(DEVICE)
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
        peer.to(DEVICE).eval()
        mask = torch.ones_like(prompts)
        options = {"max_length": length, "do_sample": False, "use_cache": True, "pad_token_id": 0}
        runs["transformers"] = lambda: peer.generate(prompts, attention_mask=mask, **options)
    seconds = median_seconds(rounds, **runs)
    figures: Figures = {
        "sequences": num,
        "length": length,
        "prompt_length": prompt_length,
        "parameters": count_parameters(model),
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
        "acceptance": result.accepted / result.attempts,
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


def _python(*arguments: str) -> None:
    """Run this interpreter from the repository's root, quietly; fail loudly."""
    subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, capture_output=True, text=True)


BENCHMARKS: dict[str, Callable[[], Figures]] = {
    "checkpoint": bench_checkpoint,
    "corpus": bench_corpus,
    "generate": bench_generate,
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
