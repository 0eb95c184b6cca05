"""Launches without the seconds of importing torch: every rank is forked from one process that has it imported.

For runs left alone, for reruns, and for faults that a process does to itself. What a launcher does, what a
signal from outside does, and what a process does at its start takes a fresh launch: ``faults.start``.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
import time
from collections.abc import Mapping, Sequence
from multiprocessing import connection, forkserver
from pathlib import Path
from unittest import mock

from harness import environment

_ranks = multiprocessing.get_context("forkserver")
# torch._dynamo and matplotlib come with the first optimizer and the first figure.
_ranks.set_forkserver_preload(["accel_train.experiment", "torch._dynamo", "matplotlib.figure"])


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
    runpy.run_path(argv[0], run_name="__main__")


def run_ranks(argv: Sequence[str], envs: Sequence[Mapping[str, str]], output: Path, *, timeout: float) -> int:
    """Run ``python argv`` once for each environment, all at a time; returns 0, or the code of the first that failed.

    When one fails the others get SIGTERM, as from a launcher. What all of them print is appended to
    ``output``. The warm process is started by the first call and ends with the caller's process.

    Raises:
        TimeoutError: one did not end in ``timeout`` seconds; all are killed.
    """
    # Libraries read the number of threads when they are loaded.
    with mock.patch.dict(os.environ, environment(), clear=True):
        forkserver.ensure_running()
    running = [_ranks.Process(target=_be, args=(argv, env, output)) for env in envs]
    for process in running:
        process.start()
    code, deadline = 0, time.monotonic() + timeout
    while running:
        if not connection.wait([process.sentinel for process in running], deadline - time.monotonic()):
            for process in running:
                process.kill()
            raise TimeoutError(f"{argv} did not end in {timeout} s: {output.read_text()}")
        for process in [process for process in running if process.exitcode is not None]:
            running.remove(process)
            if process.exitcode and not code:
                code = process.exitcode
                for other in running:
                    other.terminate()
    return code
