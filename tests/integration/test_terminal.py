"""What a person sees: bars on a terminal, plain lines in a log file, and every line once."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from harness import TINY, Shown, command, in_terminal, launch, record, run, write_config

SHORT: dict[str, Any] = {"training": {"max_epochs": 2}, "checkpoint": {"every_steps": None}}
HEADINGS = ("run", "graph", "corpus", "preflight", "model", "training", "epoch", "completed", "record")
FIGURES = r"loss \d\.\d{4}  edge \d\.\d{4}  rule \d\.\d{4}  sampled rule \d\.\d{4}  gate (not )?passed.*  \d+\.\d s"


def phases(shown: Shown) -> list[str]:
    """The headings in order, neighbours of the same phase as one."""
    words = [line.split(" ")[0] for line in shown.out.splitlines() if line.split(" ")[0] in HEADINGS]
    return [word for before, word in zip(["", *words], words, strict=False) if word != before]


def assert_told_once(shown: Shown) -> None:
    """Headings with timings where something takes time, and one summary line per epoch: each of them once."""
    twice = {line: count for line, count in Counter(shown.out.splitlines()).items() if count > 1 and line.strip()}
    assert not twice
    assert phases(shown)[:6] == ["run", "graph", "corpus", "preflight", "model", "training"]
    assert phases(shown)[-2:] == ["completed", "record"]
    for phase in ("graph", "corpus", "preflight"):
        assert re.search(r"\(\d+\.\d s\)$", shown.lines(phase)[0]), shown.lines(phase)
    assert shown.lines("model") == ["7,488 parameters on cpu, 2 processes"]
    assert shown.lines("training")[0] == "40 steps at most, 20 an epoch"
    epochs = shown.lines("epoch")
    assert len(epochs) == 2, epochs
    for number, line in enumerate(epochs, start=1):
        assert re.fullmatch(rf"{number}/2  step {20 * number}/40  {FIGURES}", line), line
    assert re.fullmatch(r"gate (not )?passed after epoch 2: .* \(40 steps, \d+\.\d s\)", shown.lines("completed")[0])


def test_a_terminal_shows_one_bar_per_epoch_with_loss_and_learning_rate(tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.yaml", TINY, SHORT, {"output_dir": str(tmp_path / "results")})
    shown = in_terminal(command(config, 2))
    assert shown.code == 0, shown.out
    # What a carriage return leaves on the screen: the bars are drawn over, the lines stay.
    drawn = [part for line in shown.out.splitlines() for part in line.split("\r")]
    bars = [part for part in drawn if "step/s" in part]
    for epoch in (1, 2):
        own = [bar for bar in bars if bar.startswith(f"epoch {epoch}/2: ")]
        assert re.search(r"100%\|.*\| 20/20 \[.*, loss \d\.\d{4}, lr \d\.\d\de-0\d\]", own[-1]), own
        done = [int(match[1]) for bar in own if (match := re.search(r"(\d+)/20 \[", bar))]
        assert done == sorted(done), "two processes draw into one bar"
    assert len(bars) == len([bar for bar in bars if re.match("epoch [12]/2: ", bar)])

    plain = Shown(0, "\n".join(part.rstrip() for part in drawn if part not in bars))
    assert_told_once(plain)
    assert len(plain.lines("training")) == 1, "no log lines beside the bar"


@pytest.mark.slow
def test_a_pipe_gets_plain_lines_one_per_log_interval(tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.yaml", TINY, SHORT, {"output_dir": str(tmp_path / "results")})
    shown = Shown(0, run(config, 2))
    assert "\r" not in shown.out
    assert "\x1b" not in shown.out
    assert "step/s" not in shown.out
    assert_told_once(shown)
    logged = shown.lines("training")[1:]
    assert len(logged) == 10
    for number, line in enumerate(logged, start=1):
        step = f"epoch {1 + (4 * number - 1) // 20}/2  step {4 * number:>2}/40"
        figures = r"loss \d\.\d{4}  lr \d\.\d\de-0\d  grad norm \d+\.\d{3}  [\d,]+ tokens/s"
        assert re.fullmatch(rf"{step}  {figures}", line), line


def test_a_reader_that_leaves_does_not_stop_the_run(tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.yaml", TINY, {"output_dir": str(tmp_path / "results")})
    process = launch(config, 0)
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=60) == 0
    assert record(tmp_path / "results")["status"] == "completed"
