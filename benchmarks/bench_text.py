"""The benchmark of the text task: output layer and loss, tokenization of a large corpus, use of the model."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_model

from accel_train.config.parse import parse_config
from accel_train.model.transformer import TransformerLM
from accel_train.runs.directory import CONFIG_FILE, dump_config
from accel_train.runs.initial_weights import WEIGHTS
from accel_train.tasks.registry import config_class
from accel_train.tasks.text.builtin import builtin_text
from accel_train.tasks.text.corpus import check_corpus
from accel_train.tasks.text.inference_cost import measure_apart, peak_rss_bytes
from accel_train.tasks.text.tokenizer import TOKENIZER_FILE, TextTokenizer, train_tokenizer
from accel_train.tasks.text.tokens import write_tokens
from accel_train.training.losses import fused_cross_entropy, next_token_cross_entropy
from accel_train.training.step import build_optimizer

FILE = Path(__file__).parents[1] / "examples" / "text_default.yaml"
EXAMPLE = parse_config(["--config", str(FILE)], config_class)[0]
MODEL, VOCAB = EXAMPLE.model, EXAMPLE.section.vocab_size
CONTEXT, BATCH = MODEL.max_seq_len, EXAMPLE.training.batch_size
ORIGINAL_TOKENS_PER_SECOND = 5200
"""Of the trainer that this one replaces, measured on the same kind of machine."""
CORPUS_BYTES, SAMPLE_BYTES = 200_000_000, 40_000_000


def bench_text() -> dict[str, Any]:
    """Steps with the fused and the plain loss, use of the model, tokens of 200 MB.

    Goals: 10,400 tokens/s; 250 ms and 400 MB; 0.8 of the library's rate in 500 MB.
    """
    return {**_steps(), **_use(), **_tokenization()}


def _steps(rounds: int = 5, steps: int = 6) -> dict[str, Any]:
    """Tokens per second of whole steps in a bare loop, in turns; the trainer's own figure stands in a run's record."""

    def stepper(loss_fn: Callable[[Any, Any], torch.Tensor]) -> Callable[[], None]:
        torch.manual_seed(0)
        model = TransformerLM(MODEL, VOCAB)
        optimizer = build_optimizer(model, EXAMPLE.training, torch.device("cpu"))
        batch = torch.randint(VOCAB, (BATCH, CONTEXT)), torch.randint(VOCAB, (BATCH, CONTEXT))

        def run() -> None:
            for _ in range(steps):
                torch.autograd.backward(loss_fn(model, batch))
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()

        return run

    loops = {"fused": stepper(fused_cross_entropy), "plain": stepper(next_token_cross_entropy)}
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for number in range(rounds + 1):
        for name, loop in loops.items():
            began = time.perf_counter()
            loop()
            if number:
                seconds[name].append(time.perf_counter() - began)
    tokens = steps * BATCH * CONTEXT
    rate = {name: tokens / statistics.median(each) for name, each in seconds.items()}
    return {
        "tokens_per_second_fused": rate["fused"],
        "tokens_per_second_plain": rate["plain"],
        "ratio_fused_to_plain": rate["fused"] / rate["plain"],
        "ratio_to_original": rate["fused"] / ORIGINAL_TOKENS_PER_SECOND,
    }


def _use(rounds: int = 3) -> dict[str, Any]:
    """What a process costs that only loads the default model and generates; weights cost the same trained or not."""
    tokenizer = train_tokenizer("bpe", builtin_text(3_000_000, 0), VOCAB)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = Path(directory)
        save_model(TransformerLM(MODEL, VOCAB), str(checkpoint / WEIGHTS))
        (checkpoint / TOKENIZER_FILE).write_text(tokenizer.content, encoding="utf-8")
        (checkpoint / CONFIG_FILE).write_text(dump_config(EXAMPLE))
        found = [measure_apart(checkpoint, lambda: False) for _ in range(rounds)]
    return {
        "latency_p50_ms": statistics.median(each.latency_p50_ms for each in found),
        "latency_p95_ms": statistics.median(each.latency_p95_ms for each in found),
        "rss_mb": max(each.rss_mb for each in found),
    }


def _tokenization() -> dict[str, Any]:
    """A corpus of 200 MB in a process of its own; its rate beside the library's batch encoding, in turns."""
    with tempfile.TemporaryDirectory() as directory:
        whole, part, tokenizer = (Path(directory) / name for name in ("whole.txt", "part.txt", "tokenizer.json"))
        for path, size in ((whole, CORPUS_BYTES), (part, SAMPLE_BYTES)):
            with path.open("w", encoding="utf-8") as file:
                file.writelines(builtin_text(size, 0))
        tokenizer.write_text(train_tokenizer("bpe", builtin_text(3_000_000, 0), VOCAB).content, encoding="utf-8")
        large = _apart("ours", whole, tokenizer)
        rounds = [{name: _apart(name, part, tokenizer) for name in ("ours", "library")} for _ in range(3)]
    rate = {
        name: SAMPLE_BYTES / 1e6 / statistics.median(each[name]["seconds"] for each in rounds)
        for name in ("ours", "library")
    }
    return {
        "tokenize_200mb_seconds": large["seconds"],
        "tokenize_200mb_peak_rss_mb": large["peak_rss_mb"],
        "tokenize_mb_per_second": rate["ours"],
        "library_mb_per_second": rate["library"],
        "ratio": rate["ours"] / rate["library"],
        "ratio_of": "our tokenization, from file to shards, to the library's batch encoding of lines in memory",
    }


def _apart(name: str, corpus: Path, tokenizer: Path) -> dict[str, float]:
    line = [sys.executable, __file__, name, str(corpus), str(tokenizer)]
    done = subprocess.run(line, check=True, capture_output=True, text=True)
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def _main(name: str, corpus: Path, tokenizer_file: Path) -> None:
    tokenizer = TextTokenizer.load(tokenizer_file)
    if name == "ours":
        with tempfile.TemporaryDirectory(dir=corpus.parent) as directory:
            began = time.perf_counter()
            checked = check_corpus([corpus])
            write_tokens(Path(directory), checked.pieces(), tokenizer, checked.sha256)
            seconds = time.perf_counter() - began
    else:
        lines = corpus.read_text(encoding="utf-8").splitlines(keepends=True)
        began = time.perf_counter()
        for start in range(0, len(lines), 10_000):
            tokenizer._tokenizer.encode_batch_fast(lines[start : start + 10_000], add_special_tokens=False)
        seconds = time.perf_counter() - began
    print(json.dumps({"seconds": seconds, "peak_rss_mb": peak_rss_bytes() / 1e6}))


if __name__ == "__main__":
    _main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
