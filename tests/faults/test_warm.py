"""Ranks forked from a warm process stand for fresh launches: same bits, codes and environment."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil
import pytest
import warm
from faults import SCRIPT, check_finished_like, complaint, configured, rank_environments, slow, train, undisturbed
from harness import environment, run, wait_for


@pytest.mark.parametrize("world", [0, pytest.param(2, marks=slow)])
def test_a_fresh_launch_has_the_same_bits(tmp_path: Path, world: int) -> None:
    config, results = configured(tmp_path)
    run(config, world, script=SCRIPT)
    check_finished_like(results, undisturbed(world, tmp_path), launches=1)


def test_codes_and_output_arrive(tmp_path: Path) -> None:
    config, _ = configured(tmp_path)
    assert "training.batch_size" in complaint(train(config, 0, "--training.batch_size", "none", expect=2))


def test_every_rank_has_its_environment_and_when_one_fails_the_others_are_told(tmp_path: Path) -> None:
    script, output, spoken = tmp_path / "ask.py", tmp_path / "output.txt", tmp_path / "spoken"
    script.write_text(
        "import multiprocessing, os, pathlib, sys, time\n"
        "rank, spoken = int(os.environ['RANK']), pathlib.Path(sys.argv[1])\n"
        "asked = os.environ['WORLD_SIZE'], os.getsid(0) == os.getpid(), len(os.environ)\n"
        "print(rank, *asked, multiprocessing.get_start_method(), flush=True)\n"
        "if rank == 0:\n"
        "    spoken.touch()\n"
        "    time.sleep(60)\n"
        "while not spoken.exists(): time.sleep(0.01)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    envs = rank_environments(2)
    assert warm.run_ranks([str(script), str(spoken)], envs, output, timeout=30) == -signal.SIGKILL
    assert sorted(output.read_text().splitlines()) == [
        f"{rank} 2 True {len(env)} fork" for rank, env in enumerate(envs)
    ]
    assert set(environment()) <= set(envs[0])
    assert "RANK" not in os.environ


WITH_CHILD = """
import os, subprocess, sys, time
print(os.getpid(), subprocess.Popen(["sleep", "60"]).pid, flush=True)
time.sleep(float(sys.argv[1]))
"""


@pytest.mark.parametrize(
    ("seconds", "error", "says"), [(60, TimeoutError, "did not end"), (0, AssertionError, "sleep")]
)
def test_nothing_outlives_a_rank(tmp_path: Path, seconds: int, error: type[Exception], says: str) -> None:
    script, output = tmp_path / "with_child.py", tmp_path / "output.txt"
    script.write_text(WITH_CHILD)
    with pytest.raises(error, match=says):
        warm.run_ranks([str(script), str(seconds)], [environment()], output, timeout=3)
    for pid in map(int, output.read_text().split()):
        wait_for(lambda pid=pid: not alive(pid), f"the end of process {pid}", timeout=5)


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
