"""What only a CUDA device can show; run by `benchmarks/bench_gpu.sh`, skipped elsewhere."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import yaml
from harness import ACCELERATE, ROOT, TINY, outcome, record, write_config

from accel_train.config.sections import ModelConfig, TrainingConfig
from accel_train.data.windows import copy_to_device
from accel_train.errors import NonFinite
from accel_train.model import generation
from accel_train.model.cuda_graph import capture as record_graph
from accel_train.model.generation import generate
from accel_train.model.transformer import TransformerLM
from accel_train.tasks.walks.dataset import WalkDataset
from accel_train.training.callbacks import Callback
from accel_train.training.losses import next_token_cross_entropy
from accel_train.training.trainer import Trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

MODEL = ModelConfig(d_model=32, n_layers=2, n_heads=2, max_seq_len=16, dropout=0.1)


def on_gpu(config: Path, *launcher: str, expect: int | None = 0, **env: str) -> str:
    """Launch with the device left to Accelerate."""

    keep = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE_")}
    path = os.pathsep.join([str(Path(__file__).parent), str(ROOT), *filter(None, [keep.get("PYTHONPATH")])])
    done = subprocess.run(
        [*ACCELERATE, *launcher, str(ROOT / "scripts" / "train.py"), "--config", str(config)],
        env={**keep, "PYTHONPATH": path, **env},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert expect is None or done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr


def dataset() -> WalkDataset:
    generator = torch.Generator().manual_seed(0)
    return WalkDataset(torch.randint(0, 50, (512, 17), generator=generator).numpy().astype("uint16"), 16)


def test_the_quick_run_passes_its_gate_on_the_gpu(tmp_path: Path) -> None:
    results = tmp_path / "results"
    quick = ROOT / "examples" / "walks_quick.yaml"
    config = write_config(tmp_path / "c.yaml", yaml.safe_load(quick.read_text()), {"output_dir": str(results)})
    on_gpu(config)
    found = record(results)
    assert found["gate"]["passed"]
    assert found["provenance"]["machine"]["device"] == torch.cuda.get_device_name()


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_sigkill_on_the_gpu_changes_no_bit(tmp_path: Path, precision: str) -> None:
    hooks = {"hooks": {"update": ["killing:at_step"]}}
    configs = {
        name: write_config(tmp_path / f"{name}.yaml", TINY, hooks, {"output_dir": str(tmp_path / name)})
        for name in ("left alone", "killed")
    }
    precision_flag = ("--mixed_precision", precision)
    on_gpu(configs["left alone"], *precision_flag)
    mark = tmp_path / "mark"
    on_gpu(configs["killed"], *precision_flag, expect=None, KILL_AT_STEP="31", KILL_MARK=str(mark))
    assert mark.exists()
    on_gpu(configs["killed"], *precision_flag)
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "left alone")


def test_a_nan_freezes_the_weights_on_the_device_until_the_log_boundary() -> None:
    torch.manual_seed(0)
    model = TransformerLM(MODEL, 50)
    kept: dict[str, torch.Tensor] = {}

    class Poison(Callback):
        def on_step_end(self, state):
            if state.step == 3:
                kept.update({k: v.clone() for k, v in trainer.unwrapped_model.state_dict().items()})
                trainer.poisoned = True

    def loss_fn(model, batch):
        logits = model(batch[0])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[1].flatten())
        return loss * torch.nan if getattr(trainer, "poisoned", False) else loss

    config = TrainingConfig(batch_size=32, max_epochs=2, log_interval=10)
    trainer = Trainer(model, dataset(), config, loss_fn=loss_fn, callbacks=[Poison()])
    with pytest.raises(NonFinite) as stopped:
        trainer.fit()
    assert stopped.value.step == 4
    assert trainer.loop_state.step == 10
    after = trainer.unwrapped_model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in kept.items())


@pytest.mark.parametrize("cuda_graph", [True, False])
def test_no_step_between_two_log_boundaries_waits_for_the_device(cuda_graph: bool) -> None:
    torch.manual_seed(0)

    class Strict(Callback):
        def on_step_end(self, state):
            # From the third step on: the first ones build kernels and allocate.
            torch.cuda.set_sync_debug_mode("error" if 3 <= state.step < 9 else "default")

    config = TrainingConfig(batch_size=32, max_epochs=1, log_interval=20, cuda_graph=cuda_graph)
    trainer = Trainer(TransformerLM(MODEL, 50), dataset(), config, callbacks=[Strict()])
    try:
        state = trainer.fit()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert state.step == 16
    assert (trainer._step._recorded is not None) is cuda_graph


RUN = """
import hashlib, os, signal, sys
import numpy as np, torch
from accel_train.config.sections import CheckpointConfig, ModelConfig, TrainingConfig
from accel_train.tasks.walks.dataset import WalkDataset
from accel_train.model.transformer import TransformerLM
from accel_train.training.callbacks import Callback
from accel_train.training.trainer import Trainer
run_dir, recorded, fatal = sys.argv[1], sys.argv[2] == "recorded", int(sys.argv[3])
class Kill(Callback):
    def on_step_end(self, state):
        if state.step == fatal:
            torch.cuda.synchronize()
            os.kill(os.getpid(), signal.SIGKILL)
walks = np.random.default_rng(0).integers(50, size=(512, 17), dtype=np.uint16)
torch.manual_seed(0)
model = TransformerLM(ModelConfig(d_model=32, n_layers=2, n_heads=2, max_seq_len=16, dropout=0.1), 50)
trainer = Trainer(
    model, WalkDataset(walks, 16), TrainingConfig(max_epochs=3, batch_size=32, cuda_graph=recorded),
    run_dir=run_dir, checkpoint=CheckpointConfig(every_steps=5), callbacks=[Kill()],
)
state = trainer.fit()
assert (trainer._step._recorded is not None) == recorded
weights = b"".join(value.cpu().numpy().tobytes() for value in trainer.unwrapped_model.state_dict().values())
print(hashlib.sha256(weights + str(state.train_loss).encode()).hexdigest(), len(state.resumes))
"""


def run_script(directory: Path, how: str, fatal: int = -1, expect: int = 0) -> list[str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    line = [sys.executable, "-c", RUN, str(directory), how, str(fatal)]
    done = subprocess.run(
        line, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout.split()


def test_a_recorded_step_computes_what_its_kernels_do_and_survives_a_sigkill(tmp_path: Path) -> None:
    bits, _ = run_script(tmp_path / "launched", "launched")
    assert run_script(tmp_path / "recorded", "recorded") == [bits, "0"]
    run_script(tmp_path / "killed", "recorded", 23, expect=-signal.SIGKILL)
    assert run_script(tmp_path / "killed", "recorded") == [bits, "1"]
    # In the middle of an epoch from one into the other.
    run_script(tmp_path / "mixed", "launched", 23, expect=-signal.SIGKILL)
    assert run_script(tmp_path / "mixed", "recorded") == [bits, "1"]


def test_a_loss_that_asks_the_device_is_not_recorded_and_trains_all_the_same(caplog) -> None:
    def loss_fn(model, batch):
        loss = next_token_cross_entropy(model, batch)
        assert loss.item() > 0
        return loss

    weights = []
    for cuda_graph in (True, False):
        torch.manual_seed(0)
        config = TrainingConfig(batch_size=32, max_epochs=1, cuda_graph=cuda_graph)
        trainer = Trainer(TransformerLM(MODEL, 50), dataset(), config, loss_fn=loss_fn)
        with caplog.at_level("INFO"):
            trainer.fit()
        assert trainer._step._recorded is None
        weights.append([value.clone() for value in trainer.unwrapped_model.state_dict().values()])
    assert "is not recorded as a CUDA graph" in caplog.text
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))


def test_batches_from_a_stream_on_the_device_are_those_of_the_file() -> None:
    walks = dataset()
    copy = copy_to_device(walks, torch.device("cuda"))
    assert copy is not None
    ids = np.random.default_rng(0).permutation(len(walks))
    for ours, theirs in zip(copy.__getitems__(ids), walks.__getitems__(ids), strict=True):
        assert torch.equal(ours.cpu(), theirs)


class CacheFree(torch.nn.Module):
    """A model that offers nothing but a forward pass and its context."""

    def __init__(self, model: TransformerLM) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(tokens)
        return logits


@pytest.mark.parametrize("positions", ["learned", "rotary"])
@pytest.mark.parametrize(("length", "recordings"), [(17, 0), (60, 1)])
def test_greedy_generation_on_the_gpu_agrees_with_a_pass_without_cache(
    positions: Literal["learned", "rotary"], length: int, recordings: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few tokens kernel by kernel, many by a recorded one."""
    done: list[int] = []

    def capture(work: Any, device: torch.device) -> Any:
        recorded = record_graph(work, device)
        done.append(1)
        return recorded

    monkeypatch.setattr(generation, "capture", capture)
    torch.manual_seed(0)
    model = TransformerLM(dataclasses.replace(MODEL, positions=positions), 50).cuda().eval()
    prompts = torch.randint(0, 50, (8, 4), device="cuda")
    cached, plain = generate(model, prompts, length), generate(CacheFree(model), prompts, length)
    assert len(done) == recordings
    # Rounding may tip a tie once; what follows differs then.
    assert (cached == plain).all(1).float().mean() >= 7 / 8
