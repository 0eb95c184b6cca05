"""What a model costs where it is used, measured in a real process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import psutil
import pytest
from configs import experiment_config
from safetensors.torch import save_file

from accel_train.config.sections import ModelConfig
from accel_train.errors import Interrupted
from accel_train.model.transformer import TransformerLM
from accel_train.runs.directory import dump_config
from accel_train.tasks.text.config import TextConfig
from accel_train.tasks.text.inference_cost import InferenceError, measure_apart, peak_rss_bytes
from accel_train.tasks.text.tokenizer import char_tokenizer


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A directory with what a checkpoint has of a model."""
    config = experiment_config(
        task="text",
        text=TextConfig(tokenizer="char"),
        model=ModelConfig(d_model=16, n_layers=1, n_heads=2, max_seq_len=32),
    )
    tokenizer = char_tokenizer()
    (tmp_path / "config.yaml").write_text(dump_config(config))
    (tmp_path / "tokenizer.json").write_text(tokenizer.content)
    save_file(TransformerLM(config.model, tokenizer.vocab_size).state_dict(), tmp_path / "model.safetensors")
    return tmp_path


def test_a_process_of_its_own_is_measured_not_this_one(checkpoint: Path) -> None:
    ballast = np.ones(60_000_000)  # 480 MB that the other process does not have
    found = measure_apart(checkpoint, lambda: False)
    assert ballast.nbytes < peak_rss_bytes()
    assert 100 < found.rss_mb < 400
    assert 0 < found.latency_p50_ms <= found.latency_p95_ms < 250
    assert found.timed_tokens > 100


def test_what_python_prints_does_not_keep_it_waiting(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than a pipe holds."""
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")
    assert measure_apart(checkpoint, lambda: False, timeout=60).timed_tokens > 100


def test_a_model_that_cannot_be_loaded_is_said(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(InferenceError, match=r"could not be used in a process of its own: .*Error"):
        measure_apart(checkpoint, lambda: False)


@pytest.mark.parametrize(("timeout", "stop", "error"), [(600, True, Interrupted), (0, False, InferenceError)])
def test_it_does_not_outlive_a_stop_or_its_time(
    checkpoint: Path, timeout: float, stop: bool, error: type[Exception]
) -> None:
    with pytest.raises(error):
        measure_apart(checkpoint, lambda: stop, timeout)
    assert not [child for child in psutil.Process().children() if "inference_cost" in " ".join(child.cmdline())]
