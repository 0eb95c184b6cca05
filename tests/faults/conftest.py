"""Makes ``harness``, ``faults`` and the scripts beside them importable by the tests and by what they launch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "integration"))
sys.path.insert(0, str(Path(__file__).parent))

from faults import Mount, configured, fault, train

from accel_train.process.fault_points import STEP_DONE

KilledRun = Callable[..., tuple[Path, Path]]


@pytest.fixture(scope="session")
def killed_run(tmp_path_factory: pytest.TempPathFactory) -> KilledRun:
    """``killed_run(world, directory, *layers)``: a run killed after step 50 of 60, copied into ``directory``.

    Returns what ``configured`` does. The run itself is made once per session and set of arguments.
    """
    made: dict[str, Path] = {}

    def copy(world: int, directory: Path, *layers: dict[str, Any]) -> tuple[Path, Path]:
        key = json.dumps([world, layers], sort_keys=True)
        if key not in made:
            config, original = configured(tmp_path_factory.mktemp("killed"), *layers)
            mark = original.with_name("killed")
            output = train(config, world, expect=None, FAULT=fault(STEP_DONE, mark, number=50))
            assert mark.exists(), output
            made[key] = original
        config, results = configured(directory, *layers)
        shutil.copytree(made[key], results)
        return config, results

    return copy


@pytest.fixture
def mount() -> Iterator[Mount]:
    """``mount(target, *options)``; unmounted after the test."""
    targets: list[Path] = []

    def attach(target: Path, *options: object) -> None:
        line = ["mount", *map(str, options), str(target)]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            pytest.skip(f"mounting is not allowed here: {done.stderr.strip()}")
        targets.append(target)

    if os.geteuid() != 0:
        pytest.skip("needs root, to mount")
    yield attach
    for target in reversed(targets):
        subprocess.run(["umount", str(target)], check=True)


@pytest.fixture
def disk(tmp_path: Path, mount: Mount) -> Path:
    """A small file system of its own."""
    path = tmp_path / "disk"
    path.mkdir()
    mount(path, "-t", "tmpfs", "-o", "size=8M", "tmpfs")
    return path
