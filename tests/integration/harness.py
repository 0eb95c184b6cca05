"""Real launches of the training script, and what they leave behind."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "train.py"
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ROOT / "accelerate_config.yaml")]

TINY: dict[str, Any] = {
    "walks": {
        "num_walks": 244,
        "walk_length": 17,
        "graph": {"n": 20, "K": 2, "p_in": 0.6, "p_out": 0.3},
        "rules": {"jumpers_per_block": 1, "jump_lengths": [2, 3]},
        "gate": {"num_sequences": 40, "prompt_length": 4, "min_rule_checks": 10, "stop_on_pass": False},
    },
    "model": {"d_model": 16, "n_layers": 2, "n_heads": 2, "max_seq_len": 16, "dropout": 0.2},
    "training": {"batch_size": 12, "learning_rate": 0.003, "max_epochs": 3, "log_interval": 4, "timeout_seconds": 60},
    "checkpoint": {"every_steps": 3, "keep_last": 2},
}
"""20 steps an epoch, 60 in all; never stopped by its gate."""


def merged(*layers: dict[str, Any]) -> dict[str, Any]:
    """Nested dictionaries laid over each other, the last one on top."""
    result: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            nested = isinstance(value, dict) and isinstance(result.get(key), dict)
            result[key] = merged(result[key], value) if nested else value
    return result


def write_config(path: Path, *layers: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(merged(*layers)))
    return path


def environment(**extra: str | None) -> dict[str, str]:
    """The environment of a launch: CPU, one thread per process, this test directory importable; None removes."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "TORCHELASTIC", "PET_"))}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        env.pop(name, None)
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [env.get("PYTHONPATH")])])
    ours = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **extra}
    return env | {name: value for name, value in ours.items() if value is not None}


def command(config: Path, world: int, *arguments: str, script: Path = SCRIPT) -> list[str]:
    """``python scripts/train.py`` for 0 processes, ``accelerate launch`` for one and more."""
    script_line = [str(script), "--config", str(config), *arguments]
    if world == 0:
        return [sys.executable, *script_line]
    if world == 1:
        return [*ACCELERATE, *script_line]
    return [*ACCELERATE, "--multi_gpu", "--num_processes", str(world), "--main_process_port", "0", *script_line]


def launch(
    config: Path, world: int, *arguments: str, script: Path = SCRIPT, **env: str | None
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(config, world, *arguments, script=script),
        env=environment(**env),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def run(
    config: Path,
    world: int,
    *arguments: str,
    script: Path = SCRIPT,
    expect: int | None = 0,
    timeout: float = 150,
    **env: str | None,
) -> str:
    """Launch and wait; returns the output."""
    process = launch(config, world, *arguments, script=script, **env)
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        kill_tree(process.pid)
        raise
    assert expect is None or process.returncode == expect, output
    return output


def descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def kill_tree(pid: int) -> None:
    """SIGKILL a process and everything it started."""
    for process in [*descendants(pid), psutil.Process(pid)]:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


def wait_for(condition: Callable[[], Any], what: str, timeout: float = 60) -> Any:
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"timed out waiting for {what}"
        time.sleep(0.01)


def run_dir(results: Path) -> Path:
    """The only run directory under ``results``, which may be one itself."""
    if (results / "config.yaml").exists():
        return results
    found = [path.parent for path in results.glob("*/config.yaml") if ".archived-" not in path.parent.name]
    assert len(found) == 1, found
    return found[0]


def record(results: Path) -> dict[str, Any]:
    return json.loads((run_dir(results) / "result.json").read_text())


def metrics(results: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir(results) / "metrics.jsonl").read_text().splitlines()]


def checkpoints(results: Path) -> Sequence[Path]:
    return sorted((run_dir(results) / "checkpoints").glob("step_*"))


def outcome(results: Path) -> dict[str, Any]:
    """What must not depend on how often a run was killed: final weights, curves, fingerprint, log."""
    final, found = checkpoints(results)[-1], record(results)
    timeless = ("step", "epoch", "loss", "lr", "grad_norm", "tokens_seen", "edge_compliance", "rule_compliance")
    return {
        "checkpoint": final.name,
        "weights": (final / "model.safetensors").read_bytes(),
        "losses": (final / "losses.safetensors").read_bytes(),
        "curves": found["curves"],
        "fingerprint": found["provenance"]["data_fingerprint"],
        "log": [{k: line[k] for k in timeless if k in line} for line in metrics(results)],
    }


@dataclass(frozen=True)
class Shown:
    """What a command left on the screen, and its exit code."""

    code: int
    out: str
    err: str = ""

    def lines(self, phase: str) -> list[str]:
        """The lines of progress of one phase, without its name."""
        found = [line.split(maxsplit=1) for line in self.out.splitlines()]
        return [words[1] for words in found if len(words) == 2 and words[0] == phase]


def in_terminal(command: Sequence[str], *, columns: int = 120, timeout: float = 150) -> Shown:
    """Run a command in a pseudo-terminal; ``out`` is all that came to its screen, stdout and stderr alike."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    process = subprocess.Popen(command, env=environment(), stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    screen, deadline = bytearray(), time.monotonic() + timeout
    try:
        while True:
            assert select.select([ours], [], [], max(0.0, deadline - time.monotonic()))[0], "timed out"
            try:
                chunk = os.read(ours, 65536)
            except OSError:  # how Linux says that the last process has closed the terminal
                break
            if not chunk:
                break
            screen += chunk
        return Shown(process.wait(timeout), screen.decode().replace("\r\n", "\n"))
    finally:
        os.close(ours)
        if process.poll() is None:
            kill_tree(process.pid)
