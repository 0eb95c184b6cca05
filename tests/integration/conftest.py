"""Makes ``harness`` importable by the tests and by the processes they launch, and runs commands in this process."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from harness import Shown


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Shown]]:
    """``here("train", "--seed", 1)`` answers like the console script, without the seconds of a new process."""
    import torch
    from accelerate.state import AcceleratorState

    from accel_train.commands.main import main

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def run(*arguments: object, entry: Callable[[list[str]], int] = main) -> Shown:
        AcceleratorState._reset_state(reset_partial_state=True)
        capsys.readouterr()
        code = entry([str(argument) for argument in arguments])
        return Shown(code, *capsys.readouterr())

    yield run
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(reset_partial_state=True)
