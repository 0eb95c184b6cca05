"""How a run went: ``metrics.jsonl``, one line per log interval and per evaluation, and the samples beside it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from accel_train.files.atomic import naming, write_atomic
from accel_train.runs.record import strict_json

METRICS_FILE = "metrics.jsonl"
SAMPLES_DIRECTORY = "samples"
_SAMPLES_OF_STEP = re.compile(r"step_(\d+)(\D.*)?")


class MetricsLog:
    """The log of a run: one JSON object per line, each with its ``step``.

    A line reaches the operating system before :meth:`append` returns, so it outlives the process.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, line: Mapping[str, Any]) -> None:
        """Add one line.

        Raises:
            KeyError: it has no ``step``, so :meth:`cut_back` could not place it.
            OSError: the disk is full; names the file.
        """
        _ = line["step"]
        with naming(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(strict_json(line, "line") + "\n")

    def cut_back(self, step: int, *, evaluation_due: bool = False) -> int:
        """Remove every line after ``step``, and what a killed process left half-written; atomic.

        Returns the last step that the log told of, 0 without any.

        Args:
            step: the last step whose lines stay.
            evaluation_due: the evaluation of that step will be done again, so its line goes as well.
        """
        content = self.path.read_bytes() if self.path.exists() else b""
        lines = list(_parsed(content))

        def stays(line: dict[str, Any]) -> bool:
            is_done_again = evaluation_due and "gate_passed" in line
            return bool(line["step"] < step if is_done_again else line["step"] <= step)

        kept = b"".join(raw for raw, line in lines if stays(line))
        if kept != content:
            write_atomic(self.path, kept)
        return max((line["step"] for _, line in lines), default=0)

    def read(self) -> list[dict[str, Any]]:
        """All whole lines; empty when there is no log."""
        return [line for _, line in _parsed(self.path.read_bytes())] if self.path.exists() else []


def cut_back_samples(directory: Path, step: int) -> None:
    """Remove samples of steps after ``step``: files or folders whose names begin with ``step_N``."""
    for path in directory.iterdir() if directory.is_dir() else ():
        found = _SAMPLES_OF_STEP.fullmatch(path.name)
        if found and int(found[1]) > step:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _parsed(content: bytes) -> Iterable[tuple[bytes, dict[str, Any]]]:
    """Each whole line, raw and parsed. A torn one has no newline (it may parse) or no meaning."""
    for raw in content.splitlines(keepends=True):
        try:
            line = json.loads(raw)
        except ValueError:
            continue
        if raw.endswith(b"\n") and isinstance(line, dict) and isinstance(line.get("step"), int):
            yield raw, line
