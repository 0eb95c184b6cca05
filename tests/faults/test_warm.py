"""Ranks forked from a warm process stand for fresh launches: same bits, codes and environment."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import warm
from faults import SCRIPT, check_finished_like, complaint, configured, rank_environments, slow, train, undisturbed
from harness import environment, run


@pytest.mark.parametrize("world", [0, pytest.param(2, marks=slow)])
def test_a_fresh_launch_has_the_same_bits(tmp_path: Path, world: int) -> None:
    config, results = configured(tmp_path)
    run(config, world, script=SCRIPT)
    check_finished_like(results, undisturbed(world, tmp_path), launches=1)


def test_codes_and_output_arrive(tmp_path: Path) -> None:
    config, _ = configured(tmp_path)
    assert "training.batch_size" in complaint(train(config, 0, "--training.batch_size", "none", expect=2))


def test_every_rank_has_its_environment_and_when_one_fails_the_others_are_told(tmp_path: Path) -> None:
    script, output = tmp_path / "ask.py", tmp_path / "output.txt"
    script.write_text(
        "import os, sys, time\n"
        "rank = int(os.environ['RANK'])\n"
        "asked = sys.argv[1:], os.getsid(0) == os.getpid(), len(os.environ)\n"
        "print(rank, os.environ['WORLD_SIZE'], *asked, flush=True)\n"
        "if rank: os.kill(os.getpid(), 9)\n"
        "time.sleep(60)\n"
    )
    envs = rank_environments(2)
    assert warm.run_ranks([str(script), "an option"], envs, output, timeout=30) == -signal.SIGKILL
    assert sorted(output.read_text().splitlines()) == [
        f"{rank} 2 ['an option'] True {len(env)}" for rank, env in enumerate(envs)
    ]
    assert set(environment()) <= set(envs[0])
    assert "RANK" not in os.environ


def test_a_rank_that_does_not_end_is_killed(tmp_path: Path) -> None:
    script, output = tmp_path / "sleep.py", tmp_path / "output.txt"
    script.write_text("import time\nprint('asleep', flush=True)\ntime.sleep(60)\n")
    with pytest.raises(TimeoutError, match="asleep"):
        warm.run_ranks([str(script)], [environment()], output, timeout=2)
