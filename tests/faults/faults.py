"""Launches with a fault inside, and what must hold after every one of them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import warm
from harness import (
    ROOT,
    TINY,
    Shown,
    descendants,
    environment,
    kill_tree,
    launch,
    metrics,
    outcome,
    record,
    run,
    run_dir,
    write_config,
)
from warm import rank_environments

from accel_train.checkpoints.manifest import list_checkpoints, verify

SCRIPT = Path(__file__).with_name("faulty_train.py")

slow = pytest.mark.slow
EVERY = TINY["checkpoint"]["every_steps"]

Mount = Callable[..., None]


def fault(point: str, mark: Path, do: str = "kill", **details: Any) -> str:
    """The value of ``FAULT`` for :mod:`faulty_train`."""
    return json.dumps({"point": point, "mark": str(mark), "do": do, **details})


def filled(disk: Path) -> str:
    """The command that fills ``disk`` to the last byte."""
    return f"! cat /dev/zero 2>/dev/null > '{disk}/ballast'"


def start(config: Path, world: int, *arguments: str, **env: str | None) -> subprocess.Popen[str]:
    """Launch :mod:`faulty_train`; ``FAULT=fault(...)`` says what is to go wrong."""
    return launch(config, world, *arguments, script=SCRIPT, **env)


def start_ranks(
    config: Path, world: int, *arguments: str, only: Collection[int] | None = None, **env: str | None
) -> list[subprocess.Popen[str]]:
    """:mod:`faulty_train` as plain processes, as ``srun`` starts them: no launcher signals the others when one dies.

    ``only``: the ranks that are started, by default all.
    """
    return [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), "--config", str(config), *arguments],
            env=of_rank,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        for rank, of_rank in enumerate(rank_environments(world, **env))
        if only is None or rank in only
    ]


def train(
    config: Path, world: int, *arguments: str, expect: int | None = 0, fresh: bool = False, **env: str | None
) -> str:
    """Run :mod:`faulty_train` and wait; returns the output.

    Args:
        config: the configuration file.
        world: how many processes; one without a launcher is 0 or 1, with one (``fresh``) it is 1.
        arguments: further options.
        expect: the exit code that it must have, of several ranks that of the first to fail; None for any.
        fresh: launch it as users do, in new processes, several of them by a launcher; ``expect`` is then the
            launcher's code. Otherwise all are forked from a warm process.
        env: environment variables besides those of every launch.
    """
    if fresh:
        return run(config, world, *arguments, script=SCRIPT, expect=expect, **env)
    return warm.fork(config, world, *arguments, script=SCRIPT, expect=expect, **env)


def accel_train(*arguments: object) -> Shown:
    """Run the console command in a process of its own."""
    line = [sys.executable, "-m", "accel_train.commands.main", *map(str, arguments)]
    done = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=150, check=False)
    return Shown(done.returncode, done.stdout, done.stderr)


def check_no_traceback(output: str) -> None:
    """None of ours: the launcher of several processes prints one whenever a process fails."""
    assert f'File "{ROOT / "accel_train"}' not in output, output


def complaint(output: str) -> str:
    """The only line of error in ``output``, which holds no traceback."""
    check_no_traceback(output)
    lines = [line for line in output.splitlines() if line.startswith("accel-train: error: ")]
    assert len(lines) == 1, output
    return lines[0]


def configured(directory: Path, *layers: dict[str, Any], results: str = "results") -> tuple[Path, Path]:
    """``(configuration file, output directory)`` of a tiny run in ``directory``."""
    out = directory / results
    return write_config(directory / f"{results}.yaml", TINY, {"output_dir": str(out)}, *layers), out


def undisturbed(world: int, directory: Path, *layers: dict[str, Any]) -> dict[str, Any]:
    """What a run that nothing happens to ends with (see ``harness.outcome``), computed once per set of arguments."""
    key = json.dumps([world, layers], sort_keys=True)
    if key not in _undisturbed:
        config, results = configured(directory, *layers, results="undisturbed")
        train(config, world)
        _undisturbed[key] = outcome(results)
    return _undisturbed[key]


_undisturbed: dict[str, dict[str, Any]] = {}


def check_intact(results: Path) -> None:
    """What holds at any moment between two launches."""
    path = run_dir(results)
    for _, checkpoint in list_checkpoints(path / "checkpoints"):
        assert verify(checkpoint) == [], f"{checkpoint} counts, but is not sound"
    leftovers = [p.name for p in (path / "checkpoints").glob(".tmp-*")]
    assert len([name for name in leftovers if "rotated" not in name]) <= 1, leftovers


def check_finished_like(results: Path, expected: dict[str, Any], *, launches: int = 2) -> None:
    """A run that was disturbed and is completed: the same bits, nothing twice, nothing left over."""
    assert outcome(results) == expected
    path, found = run_dir(results), record(results)
    assert found["status"] == "completed"
    assert found["provenance"]["launches"] == launches
    lines = Counter((line["step"], "gate_passed" in line) for line in metrics(results))
    assert max(lines.values()) == 1, f"twice in metrics.jsonl: {[k for k, n in lines.items() if n > 1]}"
    assert not list((path / "checkpoints").glob(".tmp-*"))
    assert len(list_checkpoints(path / "checkpoints")) <= TINY["checkpoint"]["keep_last"] + 1
    log = (path / "logs" / "rank_0.log").read_text()
    for number in range(2, launches + 1):
        assert log.count(f"launch {number}, rank 0") == 1, "one log per rank, appended by every launch"


def read_until(process: subprocess.Popen[str], text: str) -> str:
    """What a launch printed up to and with the first line that holds ``text``; fails when it ends before."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return "".join(lines)
    raise AssertionError(f"{text!r} was never printed: {''.join(lines)}")


def finish(process: subprocess.Popen[str]) -> str:
    """Wait for a launch of which :func:`read_until` read the beginning; returns the rest of its output."""
    assert process.stdout is not None
    # Not communicate(), which would miss what the reader has buffered.
    rest = process.stdout.read()
    process.wait()
    return rest


@dataclass(frozen=True)
class End:
    """How a launch ended."""

    code: int
    output: str
    seconds: float
    """From the signal to the death of its last process."""


def signalled(process: subprocess.Popen[str], send: Any, *, patience: float = 60) -> End:
    """Call ``send(process, workers)``, then wait until the launch and everything it started are gone."""
    workers = descendants(process.pid)
    try:
        started = time.monotonic()
        send(process, workers)
        output, _ = process.communicate(timeout=patience)
        _, alive = psutil.wait_procs(workers, timeout=max(0.1, patience - (time.monotonic() - started)))
        assert not alive, f"left behind: {alive}"
        return End(process.returncode, output, time.monotonic() - started)
    finally:
        for each in [*workers, *([psutil.Process(process.pid)] if process.poll() is None else [])]:
            if each.is_running():
                kill_tree(each.pid)


def ranks_of(workers: list[psutil.Process]) -> dict[int, psutil.Process]:
    """Rank -> process."""
    found = {}
    for worker in workers:
        try:
            rank = worker.environ().get("RANK")
        except psutil.Error:
            continue
        # A rank's own children (data loading) carry the same environment.
        if rank is not None and int(rank) not in found:
            found[int(rank)] = worker
    return found
