"""What people see: lines, messages, progress of long work, and the log files beside them."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tqdm import tqdm

from accel_train.process import console as module
from accel_train.process.console import ConsoleHandler, Meter, RunLog, print_line, say

log = logging.getLogger("accel_train.test_console")


@pytest.fixture
def run_log(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., RunLog]]:
    """Open the log of a rank, which is the first of its machine or the second."""
    logs: list[RunLog] = []

    def start(rank: int, local_rank: int) -> RunLog:
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))
        logs.append(RunLog(rank))
        return logs[-1]

    level = logging.getLogger("accel_train").level
    yield start
    for each in logs:
        each.close()
    logging.getLogger("accel_train").setLevel(level)


def test_say_puts_the_phase_before_what_happened(capsys: pytest.CaptureFixture[str]) -> None:
    say("training", "begins")
    assert capsys.readouterr().out == "training   begins\n"


def test_line_does_not_tear_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    with tqdm(desc="epoch", total=4, file=sys.stdout):
        capsys.readouterr()
        print_line("a line")
        shown = capsys.readouterr().out
    cleared, _, redrawn = shown.partition("a line\n")
    assert not cleared.strip(), "the bar's line is emptied first"
    assert "epoch" in redrawn


GONE = """
import os, sys
{setup}
from accel_train.process.console import ConsoleHandler, print_line
import logging
logging.getLogger().addHandler(ConsoleHandler())
read, write = os.pipe()
os.close(read)
os.dup2(write, {number})
for _ in range(2):
    {speak}
sys.exit(7)
"""


@pytest.mark.parametrize("setup", ["", "sys.modules['tqdm'] = None"])
@pytest.mark.parametrize(("number", "speak"), [(1, "print_line('x')"), (2, "logging.warning('x')")])
def test_reader_who_is_gone_stops_nothing(setup: str, number: int, speak: str) -> None:
    code = GONE.format(setup=setup, number=number, speak=speak)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (7, "", "")


def test_lines_need_no_package() -> None:
    """The pipeline prints before it says which packages are missing."""
    code = "import sys; sys.modules['tqdm'] = None\nfrom accel_train.process.console import say; say('done', 'this')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("done       this\n", "")


def test_messages_have_the_form_of_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    handler = ConsoleHandler(logging.WARNING)
    log.addHandler(handler)
    try:
        log.warning("the %s is low", "disk")
        log.info("nothing for people")
    finally:
        log.removeHandler(handler)
    assert capsys.readouterr().err == "accel-train: warning: the disk is low\n"


@pytest.mark.parametrize(
    ("rank", "local_rank", "shown"),
    [(0, 0, ["warning", "error"]), (1, 1, []), (2, 0, ["error"])],
    ids=["rank 0", "second of its machine", "first of another machine"],
)
def test_run_log_shows_each_message_once_a_machine(
    run_log: Callable[..., RunLog], capsys: pytest.CaptureFixture[str], rank: int, local_rank: int, shown: list[str]
) -> None:
    opened = run_log(rank, local_rank)
    log.warning("one")
    log.error("two")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[1] for line in lines] == shown
    assert opened.is_on_screen == (local_rank == 0)


def test_run_log_appends_to_the_file_of_its_rank(run_log: Callable[..., RunLog], tmp_path: Path) -> None:
    for launch in (1, 2):
        opened = run_log(3, 1)
        log.info("before the directory is there")
        opened.open(tmp_path, launch)
        log.info("in launch %d", launch)
        opened.close()
        opened.close()
        log.info("after the end")
    lines = (tmp_path / "logs" / "rank_3.log").read_text().splitlines()
    assert [line.split(" INFO ")[1].partition(", rank 3")[0] for line in lines] == [
        "launch 1",
        "in launch 1",
        "launch 2",
        "in launch 2",
    ]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_meter_without_a_terminal_prints_every_five_seconds(clock: list[float]) -> None:
    said: list[str] = []
    with Meter("text read", 200_000_000, said.append) as meter:
        for _ in range(20):
            clock[0] += 1
            meter(10_000_000)
    assert said == [f"text read: {share} % of 200MB" for share in (25, 50, 75, 100)]


def test_meter_goes_back_and_learns_its_total_late(clock: list[float]) -> None:
    said: list[str] = []
    with Meter("download", None, said.append) as meter:
        meter.reach(5_000_000)
        meter.reach(0)
        clock[0] += 5
        meter.reach(3_000_000)
        clock[0] += 5
        meter.reach(6_000_000, 12_000_000)
    assert said == ["download: 3.00MB", "download: 50 % of 12.0MB"]


def test_meter_draws_a_bar_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Meter("text read", 100, lambda _: pytest.fail("no lines beside a bar")) as meter:
        meter(40)
        meter.reach(50, 200)
        assert meter._bar is not None
        assert (meter._bar.n, meter._bar.total) == (50, 200)
    assert "text read" in capsys.readouterr().err
