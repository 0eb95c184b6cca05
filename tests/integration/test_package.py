"""What is installed is whole: the wheel holds every file that the program opens beside its modules."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from harness import ROOT


def test_a_wheel_holds_the_examples_and_the_schemas(tmp_path: Path) -> None:
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    # Symbolic links stay links, as in a clone.
    shutil.copytree(ROOT / "accel_train", source / "accel_train", symlinks=True, ignore=ignored)
    shutil.copytree(ROOT / "examples", source / "examples")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    line = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--wheel-dir", "out"]
    subprocess.run(line, cwd=source, check=True, capture_output=True)
    (wheel,) = (source / "out").glob("*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith(".py")}
    expected = {f"accel_train/examples/{path.name}" for path in (ROOT / "examples").glob("*.yaml")}
    expected |= {str(path.relative_to(ROOT)) for path in (ROOT / "accel_train").rglob("*.json")}
    assert len(expected) >= 8
    assert held >= expected | {"accel_train/py.typed"}
