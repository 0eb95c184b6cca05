"""What the documentation says of tests and targets is so, and the code of the README runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from configs import experiment_config

from accel_train.runs.record import new_record, write_record
from accel_train.tasks.walks.task import WalksTask

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PREEMPTION = ROOT / "docs" / "preemption.md"
ARCHITECTURE = ROOT / "docs" / "architecture.md"
_TEST = re.compile(r"`((?:tests/)?[\w/]+\.py)(?:::(\w+))?`")


def promises() -> list[tuple[str, str]]:
    """``(promise, tests)`` of every row of the table of promises."""
    table = PREEMPTION.read_text().split("## What is promised")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("| ")]
    return [(row[0].strip(), row[1].strip()) for row in rows[1:]]


def test_every_promise_names_a_test_that_exists():
    assert len(promises()) >= 15
    for promise, tests in promises():
        named = _TEST.findall(tests)
        assert named, f"no test holds the promise {promise!r}"
        for file, name in named:
            path = ROOT / file if file.startswith("tests/") else ROOT / "tests" / "faults" / file
            assert path.is_file(), f"{promise!r} names {file}, which does not exist"
            if name:
                assert f"def {name}(" in path.read_text(), f"{promise!r} names {name}, which {file} does not have"


def test_every_make_target_that_is_named_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for document in (PREEMPTION, README):
        named = set(re.findall(r"(?:^|`)make ([a-z-]+)", document.read_text(), re.MULTILINE))
        assert named, document
        assert named <= targets, f"{document.name} names {named - targets}"


PYTHON_BLOCKS = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)


def test_the_readme_has_python_blocks():
    assert PYTHON_BLOCKS


@pytest.mark.parametrize("number", range(len(PYTHON_BLOCKS)))
def test_python_blocks_of_the_readme_run(number, tmp_path):
    """As written, but for ``/tmp``: in a directory whose ``results`` hold one run that passed its gate."""
    record = new_record(experiment_config(), WalksTask, command=["train"])
    record.experiment_id = "passed"
    record.status, record.gate.passed = "completed", True
    record.metrics.scalars |= {"gate_passed": True, "final_rule_compliance": 0.9}
    (tmp_path / "results" / "passed").mkdir(parents=True)
    write_record(tmp_path / "results" / "passed", record)
    block = PYTHON_BLOCKS[number].replace("/tmp/", f"{tmp_path}/")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}

    done = subprocess.run(
        [sys.executable, "-c", block], cwd=tmp_path, env=environment, check=False, capture_output=True, text=True
    )

    assert done.returncode == 0, done.stderr


def file_named(name: str) -> Path:
    """A path of the page: from the root, or else below the package."""
    return ROOT / name if (ROOT / name).is_file() else ROOT / "accel_train" / name


def test_files_named_by_the_architecture_exist():
    named = set(re.findall(r"`([\w/]+\.py)`", ARCHITECTURE.read_text()))
    assert len(named) >= 40
    assert {name for name in named if not file_named(name).is_file()} == set()


def test_names_in_files_of_the_architecture_exist():
    """Wherever the page says ``name`` in ``path.py``."""
    named = set(re.findall(r"`(\w+)`\s+in\s+`([\w/]+\.py)`", ARCHITECTURE.read_text()))
    assert len(named) >= 25
    missing = {
        (name, file)
        for name, file in named
        if not re.search(rf"^ *(?:def |class )?{name}\b *[(:=]", file_named(file).read_text(), re.MULTILINE)
    }
    assert missing == set()


def test_the_architecture_shows_the_layers_that_are_held():
    """Top to bottom, as import-linter has them."""
    layers = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]["layers"]
    diagram = ARCHITECTURE.read_text().split("```")[1]
    assert [line.split()[0] for line in diagram.strip().splitlines()] == layers
