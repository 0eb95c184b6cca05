"""Ranks as plain processes: what a launcher would set, without the launcher."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys


def start_ranks(code: str, world: int, **env: str) -> list[subprocess.Popen]:
    """Run ``code`` in ``world`` processes that find each other over loopback."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    return [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "OMP_NUM_THREADS": "1",
                **env,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]


def finish(processes: list[subprocess.Popen], timeout: float = 60) -> list[list[dict]]:
    """Wait for all; what each printed, one JSON object a line."""
    outputs = []
    for process in processes:
        out, err = process.communicate(timeout=timeout)
        assert process.returncode == 0, err
        outputs.append([json.loads(line) for line in out.splitlines() if line.startswith("{")])
    return outputs
