"""How time and memory grow with the size of the work: 1, 10 and 100 times, each in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_loops import random_dataset

from accel_train.config.sections import CheckpointConfig, ModelConfig, TrainingConfig
from accel_train.data.loader import DatasetWithIds
from accel_train.model.transformer import TransformerLM
from accel_train.tasks.text.builtin import builtin_text
from accel_train.tasks.text.corpus import check_corpus
from accel_train.tasks.text.inference_cost import peak_rss_bytes
from accel_train.tasks.text.tokenizer import train_tokenizer
from accel_train.tasks.text.tokens import write_tokens
from accel_train.tasks.walks.compliance import score
from accel_train.tasks.walks.config import GraphConfig, RulesConfig
from accel_train.tasks.walks.generator import generate_walks
from accel_train.tasks.walks.graph import designate_rules, generate_graph
from accel_train.training.evaluation import Share, mean_loss
from accel_train.training.losses import next_token_cross_entropy
from accel_train.training.trainer import Trainer

SIZES = (1, 10, 100)
CONTEXT, VOCAB = 64, 500
_WIDTHS = {1: 64, 10: 240, 100: 832}
Work = Callable[[], Any]


def _walks(size: int, directory: Path, *, scored: bool) -> Work:
    """Building a corpus of 5,000 walks of 256 times the size, or scoring it."""
    graph = generate_graph(GraphConfig(), seed=42)
    rules = designate_rules(graph, RulesConfig(), CONTEXT, seed=42)
    generate_walks(graph, rules, 1, 256, seed=0)
    if not scored:
        return lambda: generate_walks(graph, rules, 5000 * size, 256, seed=42)
    walks = generate_walks(graph, rules, 5000 * size, 256, seed=42).walks
    return lambda: score(walks, graph, rules)


def _checkpoint(size: int, directory: Path, *, loaded: bool) -> Work:
    """Saving a model of 160,000 parameters times the size with its optimizer, digests included, or resuming from it."""
    shape = ModelConfig(d_model=_WIDTHS[size], n_layers=2, n_heads=4, max_seq_len=16)
    dataset = random_dataset(16, 16, VOCAB)

    def trainer(steps: int) -> Trainer:
        config, keep = TrainingConfig(max_epochs=10, max_steps=steps, batch_size=8), CheckpointConfig(keep_last=2)
        return Trainer(TransformerLM(shape, VOCAB), dataset, config, run_dir=directory, checkpoint=keep)

    first = trainer(1)
    first.fit()
    if loaded:
        again = trainer(1)
        return again.fit

    def save() -> None:
        first.state.step += 1
        first.state.train_loss.append(0.0)
        first._commits.save(first.state)
        first._commits.settle()

    return save


def _evaluation(size: int, directory: Path) -> Work:
    """The loss of the anchor model on 128 held-out samples times the size."""
    model, dataset = TransformerLM(ModelConfig(), VOCAB), DatasetWithIds(random_dataset(128 * size, CONTEXT, VOCAB))
    return lambda: mean_loss(model, dataset, next_token_cross_entropy, torch.device("cpu"), Share(64))


def _tokens(size: int, directory: Path) -> Work:
    """Checking, tokenizing and writing 0.5 MB of text times the size."""
    corpus = directory / "corpus.txt"
    with corpus.open("w", encoding="utf-8") as file:
        file.writelines(builtin_text(500_000 * size, 0))
    tokenizer = train_tokenizer("bpe", builtin_text(500_000, 0), 2000)

    def write() -> None:
        checked = check_corpus([corpus])
        write_tokens(directory / "tokens", checked.pieces(), tokenizer, checked.sha256)

    (directory / "tokens").mkdir()
    return write


WORKS: dict[str, Callable[[int, Path], Work]] = {
    "corpus": lambda size, directory: _walks(size, directory, scored=False),
    "scoring": lambda size, directory: _walks(size, directory, scored=True),
    "tokenization": _tokens,
    "checkpoint": lambda size, directory: _checkpoint(size, directory, loaded=False),
    "resume": lambda size, directory: _checkpoint(size, directory, loaded=True),
    "evaluation": _evaluation,
}


def bench_growth() -> dict[str, Any]:
    """Time and memory of everything beside the loop at 1, 10 and 100 times the size (goal: linear or better)."""
    found = {name: _at_every_size(name) for name in WORKS}
    ratios = {name: each[-1]["seconds"] / each[0]["seconds"] for name, each in found.items()}
    worst = max(ratios, key=ratios.__getitem__)
    return {
        **{f"{name}_seconds": [each["seconds"] for each in sizes] for name, sizes in found.items()},
        **{f"{name}_peak_rss_mb": [each["peak_rss_mb"] for each in sizes] for name, sizes in found.items()},
        "slowest_growing": worst,
        "ratio": ratios[worst] / SIZES[-1],
        "ratio_of": "seconds at 100 times the size to 100 times the seconds, of what grows fastest",
    }


def _at_every_size(name: str) -> list[dict[str, float]]:
    """The smallest size before, between and after the others, and its median: the machine's speed moves meanwhile."""
    small = [_apart(name, SIZES[0])]
    larger = []
    for size in SIZES[1:]:
        larger.append(_apart(name, size))
        small.append(_apart(name, SIZES[0]))
    return [sorted(small, key=lambda figures: figures["seconds"])[len(small) // 2], *larger]


def _apart(name: str, size: int) -> dict[str, float]:
    done = subprocess.run([sys.executable, __file__, name, str(size)], check=True, stdout=subprocess.PIPE, text=True)
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def _main(name: str, size: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        work = WORKS[name](size, Path(directory))
        began = time.perf_counter()
        work()
        seconds = time.perf_counter() - began
    print(json.dumps({"seconds": seconds, "peak_rss_mb": peak_rss_bytes() / 1e6}))


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]))
