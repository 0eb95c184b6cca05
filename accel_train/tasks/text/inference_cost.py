"""What a model costs where it is used: milliseconds per token and megabytes, measured in a process of its own.

``python -m accel_train.tasks.text.inference_cost CHECKPOINT`` loads the weights and the tokenizer of a
checkpoint and generates, on the CPU, and nothing else: its memory is that of a program that uses
the model, not that of the trainer.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
import yaml
from safetensors.torch import load_file

from accel_train.config.fields import from_dict
from accel_train.config.sections import ModelConfig
from accel_train.model.generation import stream
from accel_train.model.transformer import TransformerLM
from accel_train.process.signals import tied_to_this_process
from accel_train.process.work import StopCheck, WorkContext
from accel_train.tasks.text.config import TextConfig
from accel_train.tasks.text.tokenizer import TOKENIZER_FILE, TextTokenizer

WARM_UP_TOKENS = 32
TIMED_TOKENS = 256


@dataclass(frozen=True)
class InferenceCost:
    """Figures of a process that loads a model and generates."""

    latency_p50_ms: float
    """Median of the milliseconds from one token to the next, with a key-value cache."""
    latency_p95_ms: float
    """95th percentile."""
    rss_mb: float
    """Largest resident memory of the process, in megabytes of 10**6 bytes."""
    threads: int
    """Threads of torch."""
    timed_tokens: int
    """Tokens that the percentiles are of."""


class InferenceError(RuntimeError):
    """The process that was to use the model failed."""


def measure_apart(checkpoint: Path, should_stop: StopCheck, timeout: float = 600.0) -> InferenceCost:
    """Measure ``checkpoint`` in a fresh process.

    Raises:
        InferenceError: it failed or took longer than ``timeout`` seconds; holds its last words.
        Interrupted: ``should_stop()`` turned true; the process is gone.
    """
    # No GPU and no launch: it is one process by itself, whatever this one is part of.
    ours = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    env = {name: value for name, value in os.environ.items() if name not in ours} | {"CUDA_VISIBLE_DEVICES": ""}
    # This package may be found by where its script lies alone.
    env["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[3]), *filter(None, [env.get("PYTHONPATH")])])
    line = tied_to_this_process([sys.executable, "-m", __name__, str(checkpoint)])
    # Files, not pipes: whatever it prints, nobody needs to read it while it runs. A session of its own: a Ctrl-C is
    # answered here.
    with (
        tempfile.TemporaryFile("w+") as out,
        tempfile.TemporaryFile("w+") as err,
        subprocess.Popen(line, env=env, stdout=out, stderr=err, start_new_session=True) as process,
    ):
        try:
            what = f"using {checkpoint}"
            work = WorkContext(should_stop=should_stop)
            if not work.wait_for("inference", lambda: process.poll() is not None, timeout, lambda: what):
                raise InferenceError(f"{what} took longer than {timeout:g} s")
        finally:
            process.kill()
        output, errors = _lines(out), _lines(err)
    if process.returncode:
        last = errors[-1] if errors else f"exit code {process.returncode}"
        raise InferenceError(f"{checkpoint} could not be used in a process of its own: {last}")
    try:
        return InferenceCost(**json.loads(output[-1]))
    except (IndexError, ValueError, TypeError) as error:
        what = f"the process that used {checkpoint} did not end with its figures: {output[-1:]}"
        raise InferenceError(what) from error


def _lines(file: TextIO) -> list[str]:
    file.seek(0)
    return file.read().strip().splitlines()


def measure(checkpoint: Path) -> InferenceCost:
    """Load ``checkpoint`` and generate, in this process."""
    values = yaml.safe_load((checkpoint / "config.yaml").read_text(encoding="utf-8"))
    text, model_config = from_dict(values["text"], TextConfig), from_dict(values["model"], ModelConfig)
    tokenizer = TextTokenizer.load(checkpoint / TOKENIZER_FILE)
    model = TransformerLM(model_config, tokenizer.vocab_size)
    model.load_state_dict(load_file(checkpoint / "model.safetensors"))
    prompt = tokenizer.encode(text.prompt)[-model_config.max_seq_len :]
    generator = torch.Generator().manual_seed(0)
    tokens = stream(model, prompt, WARM_UP_TOKENS + TIMED_TOKENS, generator=generator)
    milliseconds = 1e3 * np.diff([time.perf_counter() for _ in tokens])[WARM_UP_TOKENS - 1 :]
    p50, p95 = np.percentile(milliseconds, [50, 95])
    return InferenceCost(float(p50), float(p95), peak_rss_bytes() / 1e6, torch.get_num_threads(), len(milliseconds))


def peak_rss_bytes() -> int:
    """The largest resident memory of this process so far.

    On Linux not ``ru_maxrss``: that survives ``exec`` and begins with the size of whoever started this process.
    """
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes there
    status = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return 1024 * int(line.split()[1])


if __name__ == "__main__":
    print(json.dumps(asdict(measure(Path(sys.argv[1])))))
