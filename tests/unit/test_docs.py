"""What the documentation says of the tests is so."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PREEMPTION = ROOT / "docs" / "preemption.md"
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
    for document in (PREEMPTION, ROOT / "README.md"):
        named = set(re.findall(r"(?:^|`)make ([a-z-]+)", document.read_text(), re.MULTILINE))
        assert named, document
        assert named <= targets, f"{document.name} names {named - targets}"
