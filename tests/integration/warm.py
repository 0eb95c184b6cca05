"""Launches without the seconds of importing torch: every rank is forked from one process that has it imported.

For runs left alone, for reruns, and for faults that a process does to itself. What a launcher does, what a
signal from outside does, and what a process does at its start or in its last moments (``atexit``, the end of
the interpreter) takes a fresh launch: ``harness.run`` and ``harness.launch``.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import secrets
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing import connection, forkserver
from pathlib import Path
from unittest import mock

import psutil
from harness import SCRIPT, environment

_ranks = multiprocessing.get_context("forkserver")
# torch._dynamo and matplotlib come with the first optimizer and the first figure.
_ranks.set_forkserver_preload(["accel_train.runs.experiment", "torch._dynamo", "matplotlib.figure"])


def _be(argv: Sequence[str], env: Mapping[str, str], output: Path) -> None:
    """Become ``python argv`` with the environment ``env``; stdout and stderr go to the end of ``output``."""
    os.setsid()
    sink = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(sink, stream)
    os.environ.clear()
    os.environ.update(env)
    sys.path[:0] = [str(Path(argv[0]).parent), *env["PYTHONPATH"].split(os.pathsep)]
    sys.argv = list(argv)
    # Data workers are children of their rank, as in a process that nobody forked.
    multiprocessing.set_start_method("fork", force=True)
    runpy.run_path(argv[0], run_name="__main__")


def _members(sessions: set[int]) -> list[psutil.Process]:
    """The processes that belong to one of ``sessions``: a rank begins one, and its children are in it."""
    found = []
    for process in psutil.process_iter():
        with suppress(ProcessLookupError):
            if os.getsid(process.pid) in sessions and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def run_ranks(argv: Sequence[str], envs: Sequence[Mapping[str, str]], output: Path, *, timeout: float) -> int:
    """Run ``python argv`` once for each environment, all at a time; returns 0, or the code of one that failed first.

    When one fails the others get SIGTERM, as from a launcher. What all of them print is appended to
    ``output``. The warm process is started by the first call and ends with the caller's process.

    Raises:
        TimeoutError: one did not end in ``timeout`` seconds.
        AssertionError: a rank has left a child behind.
    """
    # Libraries read the number of threads when they are loaded.
    with mock.patch.dict(os.environ, environment(), clear=True):
        forkserver.ensure_running()
    ranks = [_ranks.Process(target=_be, args=(argv, env, output)) for env in envs]
    begun = []
    try:
        for rank in ranks:
            rank.start()
            begun.append(rank)
        code, deadline, running = 0, time.monotonic() + timeout, list(ranks)
        while running:
            if not connection.wait([rank.sentinel for rank in running], deadline - time.monotonic()):
                raise TimeoutError(f"{argv} did not end in {timeout} s: {output.read_text()}")
            for rank in [rank for rank in running if rank.exitcode is not None]:
                running.remove(rank)
                if rank.exitcode and not code:
                    code = rank.exitcode
                    for other in running:
                        other.terminate()
        left = _members({rank.pid for rank in begun})
        assert not left, f"left behind: {left}"
        return code
    finally:
        for process in _members({rank.pid for rank in begun}):
            process.kill()
        for rank in begun:
            rank.join()


def rank_environments(world: int, **env: str | None) -> list[dict[str, str]]:
    """The environments of ranks that no launcher starts; one process is no rank, and as little distributed as alone."""
    if world <= 1:
        return [environment(**env)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    return [environment(**meeting | env | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(world)]


def fork(
    config: Path, world: int, *arguments: str, script: Path = SCRIPT, expect: int | None = 0, **env: str | None
) -> str:
    """Run the training script to its end in ``world`` forked processes (0 or 1: a single one); returns the output.

    ``expect`` is the exit code that it must have, of several ranks that of the first to fail; None for any.
    """
    output = config.parent / f"output-{secrets.token_hex(4)}.txt"
    line = [str(script), "--config", str(config), *arguments]
    code = run_ranks(line, rank_environments(world, **env), output, timeout=150)
    printed = output.read_text()
    assert expect is None or code == expect, printed
    return printed
