"""What only a CUDA device can show; run by `benchmarks/bench_gpu.sh tests`, skipped elsewhere.

The script selects by words in the names: "record", then "bits", then the rest. Imports nothing that a machine with
PyTorch, Accelerate and pytest may lack, beside what the package itself needs.
"""

from __future__ import annotations

import dataclasses
import gc
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from harness import ACCELERATE, ROOT, TINY, outcome, record, write_config

from accel_train.config.sections import ModelConfig, TrainingConfig
from accel_train.data.windows import copy_to_device
from accel_train.errors import NonFinite
from accel_train.model import generation
from accel_train.model.cuda_graph import capture as record_graph
from accel_train.model.generation import generate
from accel_train.model.transformer import TransformerLM
from accel_train.ranks.accelerator import build_accelerator, repeats_memory_efficient_attention
from accel_train.tasks.walks.dataset import WalkDataset
from accel_train.training.callbacks import Callback
from accel_train.training.losses import fused_cross_entropy, next_token_cross_entropy
from accel_train.training.trainer import Trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

MODEL = ModelConfig(d_model=32, n_layers=2, n_heads=2, max_seq_len=16, dropout=0.1)
DEVICE = torch.device("cuda")
LOSSES = pytest.mark.parametrize("loss_fn", [fused_cross_entropy, next_token_cross_entropy])
"""The first is what both tasks train with."""


@pytest.fixture(autouse=True)
def _process_as_it_was():
    """A test that turns something on in the process turns it off, and leaves no memory."""
    yield
    torch.use_deterministic_algorithms(False)
    torch.cuda.set_sync_debug_mode("default")
    gc.collect()
    torch.cuda.empty_cache()


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
def test_sigkill_on_the_gpu_keeps_the_bits(tmp_path: Path, precision: str) -> None:
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


@LOSSES
@pytest.mark.parametrize("cuda_graph", [True, False], ids=["recorded", "launched"])
def test_no_step_between_two_logs_waits_recorded_or_not(cuda_graph: bool, loss_fn: Any) -> None:
    torch.manual_seed(0)

    class Strict(Callback):
        def on_step_end(self, state):
            # From the third step on: the first ones build kernels and allocate.
            torch.cuda.set_sync_debug_mode("error" if 3 <= state.step < 9 else "default")

    config = TrainingConfig(batch_size=32, max_epochs=1, log_interval=20, cuda_graph=cuda_graph)
    trainer = Trainer(TransformerLM(MODEL, 50), dataset(), config, loss_fn=loss_fn, callbacks=[Strict()])
    state = trainer.fit()
    assert state.step == 16
    assert (trainer._step._recorded is not None) is cuda_graph


RUN = """
import hashlib, os, signal, sys
import numpy as np, torch
from accel_train.config.sections import CheckpointConfig, ModelConfig, TrainingConfig
from accel_train.tasks.walks.dataset import WalkDataset
from accel_train.model.transformer import TransformerLM
from accel_train.training.callbacks import Callback
from accel_train.training.losses import fused_cross_entropy, next_token_cross_entropy
from accel_train.training.trainer import Trainer
run_dir, recorded, fatal = sys.argv[1], sys.argv[2] == "recorded", int(sys.argv[3])
loss_fn = {"fused": fused_cross_entropy, "plain": next_token_cross_entropy}[sys.argv[4]]
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
    run_dir=run_dir, checkpoint=CheckpointConfig(every_steps=5), callbacks=[Kill()], loss_fn=loss_fn,
)
state = trainer.fit()
assert (trainer._step._recorded is not None) == recorded
weights = b"".join(value.cpu().numpy().tobytes() for value in trainer.unwrapped_model.state_dict().values())
print(hashlib.sha256(weights + str(state.train_loss).encode()).hexdigest(), len(state.resumes))
"""


def run_script(directory: Path, how: str, loss: str, fatal: int = -1, expect: int = 0, **env: str) -> list[str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    line = [sys.executable, "-c", RUN, str(directory), how, str(fatal), loss]
    done = subprocess.run(
        line, env={**os.environ, "PYTHONPATH": path, **env}, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout.split()


def test_a_recorded_step_computes_what_its_kernels_do_and_survives_a_sigkill(tmp_path: Path) -> None:
    """Killed in the middle of an epoch; the second time, what was launched kernel by kernel goes on recorded."""
    bits, _ = run_script(tmp_path / "launched", "launched", "fused")
    assert run_script(tmp_path / "recorded", "recorded", "fused") == [bits, "0"]
    for before in ("recorded", "launched"):
        directory = tmp_path / f"killed while {before}"
        run_script(directory, before, "fused", 23, expect=-signal.SIGKILL)
        assert run_script(directory, "recorded", "fused") == [bits, "1"]


def test_a_step_recorded_with_the_plain_loss_computes_what_its_kernels_do(tmp_path: Path) -> None:
    bits, _ = run_script(tmp_path / "launched", "launched", "plain")
    assert run_script(tmp_path / "recorded", "recorded", "plain") == [bits, "0"]


def test_a_compiled_step_is_recorded(tmp_path: Path) -> None:
    """The script itself asserts that it was."""
    bits, resumes = run_script(tmp_path / "compiled", "recorded", "fused", ACCELERATE_DYNAMO_BACKEND="inductor")
    assert len(bits) == 64
    assert resumes == "0"


def dropped(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.dropout(x, 0.5)


@pytest.mark.parametrize("when", ["always", "while recording"])
def test_after_a_failed_recording_dropout_and_a_second_one_work(when: str) -> None:
    """The second recording computes the bits of kernels launched one by one; no stream or pool stays behind."""
    x = torch.ones(4096, device=DEVICE)
    stream = torch.cuda.current_stream()

    def waits() -> torch.Tensor:
        if when == "always" or torch.cuda.is_current_stream_capturing():
            x.sum().item()
        return dropped(x)

    with pytest.raises(RuntimeError):
        record_graph(waits, DEVICE)
    assert torch.cuda.current_stream() == stream
    torch.cuda.manual_seed(1)
    launched = [dropped(x).clone() for _ in range(3)]
    torch.cuda.manual_seed(0)
    outputs, replay = record_graph(lambda: dropped(x), DEVICE)
    torch.cuda.manual_seed(1)
    for expected in launched:
        replay()
        assert torch.equal(outputs, expected)


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
        trainer.fit()
        assert trainer._step._recorded is None
        weights.append([value.clone() for value in trainer.unwrapped_model.state_dict().values()])
    told = [record for record in caplog.records if "is not recorded as a CUDA graph" in record.getMessage()]
    assert [record.levelname for record in told] == ["WARNING"]
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
def test_greedy_generation_agrees_with_a_pass_without_cache(
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


def attention(length: int, dtype: torch.dtype) -> tuple[list[torch.Tensor], int]:
    """Gradients of causal attention over ``length`` tokens, and the bytes that it needed at most."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    inputs = [
        torch.randn(4, 8, length, 64, generator=generator, device=DEVICE, dtype=dtype, requires_grad=True)
        for _ in range(3)
    ]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    mixed = torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=True)
    gradients = list(torch.autograd.grad(mixed.float().square().sum(), inputs))
    torch.cuda.synchronize()
    return gradients, torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_repeats_its_bits_and_needs_memory_in_proportion(dtype: torch.dtype) -> None:
    """As the trainer sets PyTorch up: float32 as well, unless the probe found its kernel not to be deterministic."""
    build_accelerator(TrainingConfig())
    assert torch.are_deterministic_algorithms_enabled()
    assert repeats_memory_efficient_attention(DEVICE) == torch.backends.cuda.mem_efficient_sdp_enabled()
    first, _ = attention(1024, dtype)
    for _ in range(20):
        again, _ = attention(1024, dtype)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    if dtype is torch.float32 and not torch.backends.cuda.mem_efficient_sdp_enabled():
        pytest.skip("float32 takes the plain products here: its memory grows with the square of the context")
    short, long = (attention(length, dtype)[1] for length in (1024, 4096))
    assert long < 6 * short


@pytest.mark.parametrize("num", [1, 256])
def test_sampled_bits_repeat_within_the_memory_of_the_logits(num: int) -> None:
    """Under deterministic algorithms. Sorting, sums and masks take some 80 bytes for each logit; coordinates of all
    places would take 60 more.
    """
    build_accelerator(TrainingConfig())
    torch.manual_seed(0)
    vocabulary = 50_000
    model = TransformerLM(dataclasses.replace(MODEL, dropout=0.0), vocabulary).to(DEVICE).eval()
    prompts = torch.randint(0, vocabulary, (num, 4), device=DEVICE)

    def sampled() -> torch.Tensor:
        generator = torch.Generator().manual_seed(3)
        return generate(model, prompts, 40, temperature=1.0, top_k=500, top_p=0.9, generator=generator)

    first = sampled()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    assert all(torch.equal(sampled(), first) for _ in range(10))
    assert torch.cuda.max_memory_allocated() - before < 120 * num * vocabulary + (64 << 20)


def test_generation_records_once_for_batches_of_one_size(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[int] = []

    def capture(work: Any, device: torch.device) -> Any:
        done.append(1)
        return record_graph(work, device)

    monkeypatch.setattr(generation, "capture", capture)
    torch.manual_seed(0)
    model = TransformerLM(dataclasses.replace(MODEL, dropout=0.0), 50).to(DEVICE).eval()
    prompts = torch.randint(0, 50, (24, 4), device=DEVICE)
    parts = generate(model, prompts, 60, batch_size=8)
    assert len(done) == 1
    assert (parts == generate(model, prompts, 60)).all(1).float().mean() >= 0.9


def test_a_step_with_loss_scaling_waits_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the scale, which tells whether the update was made."""

    class Listen(Callback):
        def on_step_end(self, state):
            torch.cuda.set_sync_debug_mode("warn" if 3 <= state.step < 9 else "default")

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        torch.manual_seed(0)
        config = TrainingConfig(batch_size=32, max_epochs=1, log_interval=20)
        trainer = Trainer(
            TransformerLM(MODEL, 50), dataset(), config, loss_fn=fused_cross_entropy, callbacks=[Listen()]
        )
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            state = trainer.fit()
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert state.step == 16
    waits = [warning for warning in heard if "called a synchronizing" in str(warning.message)]
    assert len(waits) == 6, "steps 4 to 9"


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
@pytest.mark.parametrize("step", ["31", "32"])
def test_a_lost_peer_under_nccl_is_named_within_the_timeout(tmp_path: Path, step: str) -> None:
    """Rank 1 is killed, once in a step that ends with a checkpoint: rank 0 says so, in place of waiting for a kernel
    that never ends.
    """
    hooks = {"hooks": {"update": ["killing:at_step"]}, "training": {"timeout_seconds": 20, "log_interval": 50}}
    config = write_config(tmp_path / "c.yaml", TINY, hooks, {"output_dir": str(tmp_path / "results")})
    mark = tmp_path / "mark"
    said = on_gpu(
        config, "--multi_gpu", "--num_processes", "2", expect=None,
        KILL_AT_STEP=step, KILL_MARK=str(mark), KILL_RANK="1",
    )  # fmt: skip
    assert mark.exists()
    assert "rank 1" in said
    assert "is gone" in said or "does not answer" in said
