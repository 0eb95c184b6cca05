"""Every mode of the arithmetic keeps the promise: killed and started again, the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from harness import TINY, outcome, record, write_config
from texts import TINY_TEXT
from warm import fork

from accel_train.config.sections import ModelConfig
from accel_train.model import transformer
from accel_train.model.kernels import attention, pointwise

HOOKS = {"hooks": {"update": ["killing:at_step"]}}
ACCUMULATION = {"training": {"gradient_accumulation_steps": 2}}
BF16 = {"ACCELERATE_MIXED_PRECISION": "bf16"}

WIDE: dict[str, Any] = {
    "model": {"d_model": 96, "n_heads": 6, "max_seq_len": 64},
    "walks": {"num_walks": 488, "walk_length": 65, "gate": {"num_sequences": 300}},
    "training": {"batch_size": 24},
}
"""As many steps, and tensors so large that GELU and attention take the ways that pay from some size on."""
COMPILED = {"ACCELERATE_DYNAMO_BACKEND": "inductor"}


@pytest.mark.parametrize(
    ("mode", "world", "environment"),
    [
        pytest.param({}, 1, BF16, id="bf16-1"),
        pytest.param({}, 2, BF16, id="bf16-2", marks=pytest.mark.slow),
        pytest.param(ACCUMULATION, 3, BF16, id="bf16-accumulation-3", marks=pytest.mark.slow),
        pytest.param(WIDE, 1, {}, id="wide-1"),
        pytest.param(WIDE, 2, {}, id="wide-2", marks=pytest.mark.slow),
        pytest.param(ACCUMULATION, 1, {}, id="accumulation-1", marks=pytest.mark.slow),
        pytest.param(ACCUMULATION, 3, {}, id="accumulation-3", marks=pytest.mark.slow),
        pytest.param({}, 1, COMPILED, id="compiled-1", marks=pytest.mark.slow),
        pytest.param({}, 2, COMPILED, id="compiled-2", marks=pytest.mark.slow),
        pytest.param(ACCUMULATION, 3, COMPILED, id="compiled-accumulation-3", marks=pytest.mark.slow),
        pytest.param({}, 1, {**BF16, **COMPILED}, id="compiled-bf16-1", marks=pytest.mark.slow),
        pytest.param(TINY_TEXT, 1, COMPILED, id="compiled-text-1", marks=pytest.mark.slow),
        pytest.param(TINY_TEXT, 2, BF16, id="bf16-text-2", marks=pytest.mark.slow),
    ],
)
def test_sigkill_changes_no_bit(tmp_path: Path, mode: dict, world: int, environment: dict[str, str]) -> None:
    layers = (TINY_TEXT, HOOKS) if mode is TINY_TEXT else (TINY, HOOKS, mode)
    configs = {
        name: write_config(tmp_path / f"{name}.yaml", *layers, {"output_dir": str(tmp_path / name)})
        for name in ("a", "b")
    }
    fork(configs["a"], world, **environment)
    mark = tmp_path / "killed"
    fork(configs["b"], world, expect=None, KILL_AT_STEP="32", KILL_MARK=str(mark), **environment)
    assert mark.exists()
    fork(configs["b"], world, **environment)
    assert outcome(tmp_path / "b") == outcome(tmp_path / "a")
    assert record(tmp_path / "b")["provenance"]["resumes"]


def test_wide_is_wide_enough() -> None:
    model = ModelConfig(**{**TINY["model"], **WIDE["model"]})
    batch, context = WIDE["training"]["batch_size"] // 2, model.max_seq_len
    assert batch * context * model.feed_forward_width >= pointwise._MIN_ELEMENTS
    packed = torch.zeros(batch, context, 3, model.n_heads, model.d_model // model.n_heads, requires_grad=True)
    assert attention.should_store_weights(packed)
    assert WIDE["walks"]["gate"]["num_sequences"] * model.n_heads >= transformer._MANY_SINGLE_QUERIES


def test_the_mode_was_in_force(tmp_path: Path) -> None:
    """Otherwise the test above would compare full precision with itself."""
    losses = {}
    for name, environment in {"full": {}, "bf16": BF16}.items():
        short = {"training": {"max_epochs": 1}, "output_dir": str(tmp_path / name)}
        fork(write_config(tmp_path / f"{name}.yaml", TINY, short), 1, **environment)
        losses[name] = record(tmp_path / name)["curves"]["train_loss"]
    assert losses["full"] != losses["bf16"]
    assert losses["bf16"] == pytest.approx(losses["full"], rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "environment", "tolerance"),
    [
        pytest.param({}, BF16, 2e-2, id="bf16"),
        pytest.param({}, COMPILED, 1e-3, id="compiled"),
        pytest.param(ACCUMULATION, {}, 1e-3, id="accumulation"),
        pytest.param(WIDE, {}, 1e-3, id="wide"),
    ],
)
def test_another_number_of_processes_goes_on_with_the_same_data(
    tmp_path: Path, mode: dict, environment: dict[str, str], tolerance: float
) -> None:
    """Two processes, then one, then three, by SIGKILL; no dropout, so that only the order of sums differs."""
    layers = TINY, HOOKS, mode, {"model": {"dropout": 0.0}}
    alone, elastic = (
        write_config(tmp_path / f"{name}.yaml", *layers, {"output_dir": str(tmp_path / name)}) for name in ("a", "b")
    )
    fork(alone, 1, **environment)
    for world, step in ((2, 22), (1, 43)):
        mark = tmp_path / f"killed at {step}"
        fork(elastic, world, expect=None, KILL_AT_STEP=str(step), KILL_MARK=str(mark), **environment)
        assert mark.exists()
    fork(elastic, 3, **environment)
    one, three = record(tmp_path / "a"), record(tmp_path / "b")
    assert three["provenance"]["world_sizes"] == [2, 1, 3]
    assert three["provenance"]["data_fingerprint"] == one["provenance"]["data_fingerprint"]
    assert three["curves"]["train_loss"] == pytest.approx(one["curves"]["train_loss"], abs=tolerance)
