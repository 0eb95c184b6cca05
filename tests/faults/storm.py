"""Random signals at random moments, the same command again and again, until the run is done.

    python tests/faults/storm.py --kills 200 --seed 7

A storm launches a small run, hits it with SIGKILL or SIGTERM, waits until everything the launch
started is gone, inspects what it left behind, and launches again. When a run completes, its bits
are compared with those of a twin that was never disturbed, and another run begins, until all kills
are used up; the last run is left to finish. The first broken promise ends the storm and leaves its
directory as it is.

Everything that is random about launch ``n`` is drawn from ``(seed, world, n)`` before it starts, so
a storm with the same seed throws the same signals at the same moments, as far as timing allows.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "integration"))

from harness import SCRIPT, TINY, command, environment, outcome, run, write_config

from accel_train.checkpoints.manifest import list_checkpoints, verify
from accel_train.runs.metrics_log import MetricsLog

RUN_NAME = "run"
KEEP_LAST = 2
TIMEOUT_SECONDS = 12
"""``training.timeout_seconds``: a rank that polls for one that vanished silently leaves after it."""
GONE_SECONDS = 2 * TIMEOUT_SECONDS + 10
"""Longest time from a signal until nothing of the launch is left: two waits and the interpreter's exit."""
STUCK_SECONDS = 150
"""A launch that neither trains nor ends within this time hangs."""
FIRST_GUESS_OF_START_UP = 4.0
"""Seconds from the launch to the first step, until they have been measured."""
MARK = "STORM_LAUNCH"
"""Environment variable by which all processes of a launch are found, orphans included."""

SIGNALS = [f"{name} to {target}" for name in ("SIGKILL", "SIGTERM") for target in ("all", "launcher", "one worker")]
PHASES = ["before training", "in training", "in training, saved first", "in a commit", "after the end"]

Say = Callable[[str], None]


class BrokenPromise(Exception):
    """What a launch did or left behind that it must not."""


@dataclass
class Report:
    """What a storm did and found."""

    world: int
    seed: int
    kills: int = 0
    """Signals sent to a launch that was alive."""
    launches: int = 0
    runs: int = 0
    """Runs that were disturbed and completed."""
    equal: int = 0
    """Runs with the same bits as the undisturbed twin."""
    signals: Counter[str] = field(default_factory=Counter)
    """Kills by signal and target: SIGNALS."""
    phases: Counter[str] = field(default_factory=Counter)
    """Kills by what they interrupted: PHASES."""
    steps: int = 0
    """Steps of the runs that completed."""
    lost_total: int = 0
    """Steps that were trained and logged, and then trained again because no checkpoint held them."""
    lost_max: int = 0
    """The same, of the worst kill."""
    slowest_exit: float = 0.0
    """Longest time in seconds from a signal until nothing of the launch was left."""
    seconds: float = 0.0
    """Duration of the storm, twin and checks included."""
    broken: list[str] = field(default_factory=list)
    """Broken promises; empty when all is well."""

    @property
    def sound(self) -> bool:
        """Whether every promise was kept and every completed run has the bits of its twin."""
        return not self.broken and self.equal == self.runs > 0

    def rows(self) -> list[tuple[str, str]]:
        """Name and value of every figure."""
        return [
            ("processes", str(self.world)),
            ("seed", str(self.seed)),
            ("kills", str(self.kills)),
            *((f"  {name}", str(self.signals[name])) for name in SIGNALS),
            *((f"  {name}", str(self.phases[name])) for name in PHASES),
            ("launches", str(self.launches)),
            ("runs completed", str(self.runs)),
            ("runs with equal bits", str(self.equal)),
            ("steps of these runs", str(self.steps)),
            ("steps lost, total", str(self.lost_total)),
            ("steps lost, worst kill", str(self.lost_max)),
            ("slowest exit", f"{self.slowest_exit:.1f} s"),
            ("duration", f"{self.seconds:.0f} s, {self.seconds / max(self.kills, 1):.1f} s per kill"),
            ("broken promises", str(len(self.broken))),
        ]


@dataclass(frozen=True)
class Blow:
    """One signal: which, at whom, when. ``delay`` counts from the launch, the first step, or a commit's beginning."""

    number: signal.Signals
    target: str
    moment: str
    """``start-up``, ``training`` or ``commit``."""
    delay: float
    pause: float
    """Seconds of training before the commit that is aimed at."""
    rank: int
    """Which worker, if the target is one of them."""

    @classmethod
    def draw(cls, dice: random.Random, world: int, *, launcher: bool, start_up: float) -> Blow:
        """A random one.

        Args:
            dice: where the randomness comes from.
            world: number of training processes.
            launcher: whether a launcher stands above them.
            start_up: seconds from the launch to the first step.
        """
        number = dice.choices([signal.SIGKILL, signal.SIGTERM], [3, 1])[0]
        if launcher:
            targets = ["all", "launcher", "one worker"]
        else:
            # Nobody tells a rank without a launcher that another one died: often that costs the whole timeout.
            targets = ["all", "all", "one worker"] if world > 1 else ["all"]
        moment = dice.choices(["start-up", "training", "commit"], [40, 25, 35])[0]
        # A commit takes about 10 ms with one process, 30 ms with two.
        longest = {"start-up": start_up, "training": 1.0, "commit": 0.012 * world}[moment]
        return cls(
            number,
            dice.choice(targets),
            moment,
            delay=dice.uniform(0, longest),
            pause=dice.uniform(0, 0.6),
            rank=dice.randrange(world),
        )

    def __str__(self) -> str:
        pause = f"{self.pause:.4f} s + " if self.moment == "commit" else ""
        return f"{self.number.name} to {self.target}, {pause}{self.moment} + {self.delay:.4f} s"


class Launch:
    """All processes of one launch, through Accelerate's launcher or started plainly, as ``srun`` starts ranks."""

    def __init__(self, config: Path, world: int, output: Path, *, launcher: bool) -> None:
        self.launcher, self.output = launcher, output
        self._mark = f"{MARK}={(token := secrets.token_hex(8))}".encode()
        self._processes: list[subprocess.Popen[bytes]] = []
        env = environment(**{MARK: token})
        with output.open("wb") as file:
            if launcher or world == 1:
                starts = [(command(config, world if launcher else 0), env)]
            else:
                address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(world)}
                ranks = [{**address, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]
                starts = [(command(config, 0), env | rank) for rank in ranks]
            for arguments, variables in starts:
                self._processes.append(
                    subprocess.Popen(
                        arguments, env=variables, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
                    )
                )

    def ended(self) -> bool:
        """Whether the processes that were started here (not their children) have all ended."""
        return None not in self.codes()

    def codes(self) -> list[int | None]:
        """Their exit codes; None for one that is alive."""
        return [process.poll() for process in self._processes]

    def members(self) -> list[int]:
        """Process ids of everything alive that this launch started, whoever is its parent by now."""
        self.ended()  # buries the dead, who would look like members that are about to start
        return [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/environ") if self._mark in _read(path)]

    def workers(self) -> list[int]:
        """The training processes, in order of rank as far as that shows."""
        script = str(SCRIPT).encode()
        lines = {pid: _read(Path(f"/proc/{pid}/cmdline")) for pid in sorted(self.members())}
        return [pid for pid, line in lines.items() if script in line and b"accelerate.commands.launch" not in line]

    def strike(self, blow: Blow) -> str:
        """Send the signal; returns whom it reached (the launcher, where there is no worker yet)."""
        workers = self.workers()
        if blow.target == "one worker" and workers:
            _send(workers[blow.rank % len(workers)], blow.number)
            return blow.target
        if blow.target == "all":
            for pid in self.members():
                _send(pid, blow.number)
            # What was forked meanwhile belongs to the launch as well; a SIGTERM is sent once.
            if blow.number == signal.SIGKILL:
                self.kill()
            return blow.target
        _send(self._processes[0].pid, blow.number)
        return "launcher"

    def kill(self) -> None:
        """SIGKILL everything that is left."""
        while members := self.members():
            for pid in members:
                _send(pid, signal.SIGKILL)

    def wait_until_gone(self, seconds: float) -> float:
        """Wait until nothing of the launch is alive; returns the seconds that took.

        Raises:
            BrokenPromise: something is still there after ``seconds``.
        """
        began = time.monotonic()
        empty = 0
        # Looked for twice: a process shows no environment for an instant while it starts a program.
        while empty < 2:
            members = self.members()
            empty = 0 if members or not self.ended() else empty + 1
            if time.monotonic() - began > seconds:
                what = {pid: _read(Path(f"/proc/{pid}/cmdline")).replace(b"\0", b" ").decode() for pid in members}
                raise BrokenPromise(f"not gone after {seconds:g} s, exit codes {self.codes()}, alive: {what}")
            time.sleep(0.02)
        return time.monotonic() - began


class DisturbedRun:
    """The run directory under the storm, seen from outside."""

    def __init__(self, directory: Path, settings: dict[str, Any]) -> None:
        self.results = directory / "results"
        self.config = write_config(directory / "config.yaml", settings, {"output_dir": str(self.results)})
        self.path = self.results / RUN_NAME
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.committed = 0
        """Step of the newest checkpoint at the last inspection: where the next launch starts from."""
        self._log_at_launch: tuple[int, ...] = ()
        self._torn_at_launch: set[str] = set()

    def note_launch(self) -> None:
        """Remember what the run looks like before a launch."""
        self._log_at_launch = self._log_state()
        self._torn_at_launch = self.torn()

    def _log_state(self) -> tuple[int, ...]:
        try:
            found = self.metrics.stat()
        except FileNotFoundError:
            return ()
        return found.st_ino, found.st_size, found.st_mtime_ns

    def trains(self) -> bool:
        """Whether the present launch has logged a step. Lines that it has yet to cut back are no sign of that."""
        return self._log_state() != self._log_at_launch and self._last_step() > self.committed

    def _last_step(self) -> int:
        """Newest step in the log; reads its end only."""
        try:
            with self.metrics.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
                lines = file.read().splitlines(keepends=True)
        except FileNotFoundError:
            return 0
        whole = [line for line in lines if line.startswith(b"{") and line.endswith(b"\n")]
        return int(json.loads(whole[-1])["step"]) if whole else 0

    def torn(self) -> set[str]:
        """Names of the temporary directories in ``checkpoints/``."""
        return {path.name for path in self.checkpoints.glob(".tmp-*")}

    def torn_since_launch(self) -> set[str]:
        """Those that the present launch made."""
        return self.torn() - self._torn_at_launch

    def status(self) -> str:
        """``status`` of the record; ``absent`` before there is one."""
        try:
            return str(json.loads((self.path / "result.json").read_text())["status"])
        except FileNotFoundError:
            return "absent"

    def inspect(self) -> int:
        """Check what must hold after every launch; returns the steps that are logged but in no checkpoint.

        Raises:
            BrokenPromise: something does not hold.
        """
        found = list_checkpoints(self.checkpoints)
        for _, path in found:
            if problems := verify(path):
                raise BrokenPromise(f"{path} is damaged: {'; '.join(problems)}")
        # One more than are kept between a commit and its rotation.
        if len(found) > KEEP_LAST + 1:
            raise BrokenPromise(f"{len(found)} checkpoints, {KEEP_LAST} are to be kept: {[p.name for _, p in found]}")
        if len(self.torn()) > 1:
            raise BrokenPromise(f"more than one temporary directory: {sorted(self.torn())}")
        if aside := [path.name for path in self.checkpoints.glob(".damaged-*")]:
            raise BrokenPromise(f"a launch found damaged checkpoints: {aside}")
        newest = found[-1][0] if found else 0
        if newest < self.committed:
            raise BrokenPromise(f"the newest checkpoint went back from step {self.committed} to {newest}")
        lost = self._lost(newest)
        self.committed = newest
        return lost

    def _lost(self, newest: int) -> int:
        if self._log_state() == self._log_at_launch:
            return 0  # did not train: the lines beyond the checkpoint are those of an earlier launch
        steps = [line["step"] for line in MetricsLog(self.metrics).read() if "loss" in line]
        if steps != list(range(1, len(steps) + 1)):
            raise BrokenPromise(f"{self.metrics}: the steps are not 1, 2, 3, ...: {steps}")
        if len(steps) < newest:
            raise BrokenPromise(f"{self.metrics} ends at step {len(steps)}, before the newest checkpoint's {newest}")
        return len(steps) - newest


class Storm:
    """One storm; see :func:`storm` for the arguments."""

    def __init__(self, directory: Path, world: int, kills: int, seed: int, epochs: int, say: Say) -> None:
        self.directory, self.world, self.kills, self.seed, self.say = directory, world, kills, seed, say
        self.report = Report(world, seed)
        self.settings: dict[str, Any] = {
            **TINY,
            "name": RUN_NAME,
            # Never passed for want of evidence: the checkpoint of a passed gate would be kept besides the last ones.
            "walks": {**TINY["walks"], "gate": {**TINY["walks"]["gate"], "min_rule_checks": 1000}},
            "training": {
                **TINY["training"],
                "max_epochs": epochs,
                "log_interval": 1,
                "timeout_seconds": TIMEOUT_SECONDS,
            },
            "checkpoint": {"keep_last": KEEP_LAST},
        }
        self._start_up: dict[bool, float] = {}

    def run(self) -> Report:
        """Run it; a broken promise ends it and stands in the report."""
        began = time.monotonic()
        try:
            expected = self._twin()
            while self.report.kills < self.kills or not self.report.runs:
                self._disturb(expected)
        except BrokenPromise as broken:
            self.report.broken.append(str(broken))
            self.say(f"BROKEN: {broken}")
        self.report.seconds = time.monotonic() - began
        return self.report

    def _twin(self) -> dict[str, Any]:
        results = self.directory / "twin" / "results"
        # Checkpoints that are written more seldom must not change a bit either.
        run(write_config(results.parent / "config.yaml", self.settings, {"output_dir": str(results)}), self.world)
        return outcome(results)

    def _disturb(self, expected: dict[str, Any]) -> None:
        """One run from its first launch to its comparison with the twin."""
        number = self.report.runs + 1
        every = 3 - (number - 1) % 3
        settings = {**self.settings, "checkpoint": {**self.settings["checkpoint"], "every_steps": every}}
        disturbed = DisturbedRun(self.directory / f"run_{number}", settings)
        while disturbed.status() != "completed":
            self._launch(disturbed, number, every)
        self.report.runs += 1
        found = outcome(disturbed.results)
        different = sorted(name for name in expected if found[name] != expected[name])
        if different:
            raise BrokenPromise(f"{disturbed.path} differs from its undisturbed twin in {', '.join(different)}")
        self.report.equal += 1
        self.report.steps += len(found["curves"]["train_loss"])
        self.say(f"run {number} completed with the bits of its twin; {self.report.kills}/{self.kills} kills")

    def _launch(self, disturbed: DisturbedRun, number: int, every: int) -> None:
        self.report.launches += 1
        dice = random.Random(f"{self.seed}/{self.world}/{self.report.launches}")
        launcher = dice.random() < 0.5
        start_up = self._start_up.get(launcher, FIRST_GUESS_OF_START_UP)
        blow = Blow.draw(dice, self.world, launcher=launcher, start_up=start_up)
        disturbed.note_launch()
        output = disturbed.results.parent / f"launch_{self.report.launches}.log"
        title = f"run {number} launch {self.report.launches} ({'launcher' if launcher else 'plain'})"
        launch = Launch(disturbed.config, self.world, output, launcher=launcher)
        try:
            if self.report.kills == self.kills or not self._await_moment(launch, disturbed, blow):
                self._let_finish(launch, disturbed)
                self.say(f"{title}: completed")
            else:
                self._strike(launch, disturbed, blow, every, title)
        except BrokenPromise as broken:
            raise BrokenPromise(f"{title}, {blow}: {broken}; its output is in {output}") from None
        finally:
            launch.kill()

    def _await_moment(self, launch: Launch, disturbed: DisturbedRun, blow: Blow) -> bool:
        """Wait for the moment of the blow; False when the launch ended before it."""
        began = time.monotonic()

        def waited(condition: Callable[[], Any], pause: float = 0.005) -> bool:
            while not condition():
                if launch.ended():
                    return False
                if time.monotonic() - began > STUCK_SECONDS:
                    raise BrokenPromise(f"hangs: neither trained nor ended within {STUCK_SECONDS} s")
                time.sleep(pause)
            return True

        def rest(seconds: float) -> bool:
            until = time.monotonic() + seconds
            return waited(lambda: time.monotonic() >= until, min(seconds, 0.001))

        if blow.moment == "start-up":
            return rest(blow.delay) and not launch.ended()
        if not waited(disturbed.trains):
            return False
        self._start_up[launch.launcher] = time.monotonic() - began
        if blow.moment == "commit":
            if not rest(blow.pause):
                return False
            earlier = disturbed.torn()
            if not waited(lambda: disturbed.torn() - earlier, 0.0005):
                return False
        return rest(blow.delay) and not launch.ended()

    def _let_finish(self, launch: Launch, disturbed: DisturbedRun) -> None:
        launch.wait_until_gone(STUCK_SECONDS)
        disturbed.inspect()
        if launch.codes() != [0] * len(launch.codes()) or disturbed.status() != "completed":
            raise BrokenPromise(f"ended undisturbed with {launch.codes()}, status {disturbed.status()}")

    def _strike(self, launch: Launch, disturbed: DisturbedRun, blow: Blow, every: int, title: str) -> None:
        report = self.report
        trained = disturbed.trains()
        reached = launch.strike(blow)
        gone = launch.wait_until_gone(GONE_SECONDS)
        status, torn = disturbed.status(), bool(disturbed.torn_since_launch())
        trained_at_all = disturbed.trains()
        lost = disturbed.inspect()
        phase = _phase(status, trained=trained_at_all, torn=torn)

        report.kills += 1
        report.signals[f"{blow.number.name} to {reached}"] += 1
        report.phases[phase] += 1
        report.lost_total += lost
        report.lost_max = max(report.lost_max, lost)
        report.slowest_exit = max(report.slowest_exit, gone)
        self.say(
            f"{title}: {blow}: {phase}; "
            f"newest checkpoint {disturbed.committed}, {lost} steps lost, all gone after {gone:.1f} s"
        )
        if status == "failed":
            raise BrokenPromise("a signal made a record of a failure")
        # The commit of one save may still be going on when the next one is due.
        if lost > 2 * every:
            raise BrokenPromise(f"{lost} steps lost, with a checkpoint every {every} steps at most {2 * every} may be")
        if blow.number == signal.SIGTERM:
            if lost:
                raise BrokenPromise(f"{lost} steps lost by a SIGTERM")
            if torn:
                raise BrokenPromise(f"a SIGTERM tore a checkpoint: {disturbed.torn_since_launch()}")
            if trained and status not in {"preempted", "completed"}:
                raise BrokenPromise(f"status {status} after a SIGTERM in training")


def storm(
    directory: Path, world: int, kills: int, seed: int, *, epochs: int = 20, say: Say = lambda _line: None
) -> Report:
    """Throw ``kills`` signals at runs of ``world`` processes; at least one run is brought to its end.

    Args:
        directory: where the runs and the output of every launch go; must be empty or absent.
        world: number of training processes, 1 or more.
        kills: signals to send.
        seed: of targets and moments. The runs themselves all have the same seed, and one twin.
        epochs: length of a run; 20 steps each.
        say: takes one line of progress for every launch.

    Raises:
        AssertionError: the undisturbed twin failed.
    """
    return Storm(directory, world, kills, seed, epochs, say).run()


def _phase(status: str, *, trained: bool, torn: bool) -> str:
    """What a kill interrupted, by what it left behind."""
    if status == "completed":
        return "after the end"
    if torn:
        return "in a commit"
    if not trained:
        return "before training"
    return "in training, saved first" if status == "preempted" else "in training"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _read(path: Path) -> bytes:
    """A file of ``/proc``; empty when the process is gone."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _send(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def _table(reports: Sequence[Report]) -> list[str]:
    """The figures of several storms side by side."""
    columns = [dict(report.rows()) for report in reports]
    names = list(dict.fromkeys(name for column in columns for name in column))
    cells = [[name, *(column.get(name, "0") for column in columns)] for name in names]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]


def main() -> int:
    """Storms on 1 and 2 processes, one after the other; returns 1 when a promise was broken."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, help="signals in all (default: 200)")
    parser.add_argument("--seed", type=int, default=None, help="of targets and moments (default: a new one)")
    parser.add_argument("--directory", type=Path, default=None, help="kept; default: a temporary one, kept on failure")
    options = parser.parse_args()
    seed = secrets.randbelow(10**6) if options.seed is None else options.seed
    directory = Path(tempfile.mkdtemp(prefix="storm-")) if options.directory is None else options.directory
    print(f"seed {seed}, directory {directory}", flush=True)

    reports = []
    for world, kills in ((1, options.kills // 2), (2, options.kills - options.kills // 2)):
        began = time.monotonic()

        def say(line: str, world: int = world, began: float = began) -> None:
            print(f"{time.monotonic() - began:6.0f} s  {world} proc  {line}", flush=True)

        reports.append(storm(directory / f"world_{world}", world, kills, seed, say=say))

    print("", *_table(reports), sep="\n")
    for broken in (line for report in reports for line in report.broken):
        print(f"BROKEN: {broken}")
    sound = all(report.sound for report in reports)
    if sound and options.directory is None:
        shutil.rmtree(directory)
    else:
        print(f"all launches and their output: {directory}")
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
