"""A run directory that only some processes see is refused before anything is written."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

from harness import SCRIPT, TINY, environment, write_config


def test_ranks_that_do_not_share_the_run_directory_are_refused(tmp_path: Path) -> None:
    """Two "machines" with a directory of their own each; the second would never find the first one's checkpoints."""
    config = write_config(tmp_path / "c.yaml", TINY, {"output_dir": "results", "training": {"timeout_seconds": 4}})
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(s.getsockname()[1]), "WORLD_SIZE": "2"}
    machines = [tmp_path / "first", tmp_path / "second"]
    processes = []
    for rank, directory in enumerate(machines):
        directory.mkdir()
        env = environment(RANK=str(rank), LOCAL_RANK="0", **address)
        command = [sys.executable, str(SCRIPT), "--config", str(config)]
        processes.append(
            subprocess.Popen(
                command, cwd=directory, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
        )
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [2, 2], outputs
    complaint = [line for line in outputs[0].splitlines() if line.startswith("accel-train: error: ")]
    assert len(complaint) == 1, outputs
    for part in ("output_dir", "is not shared by all processes", f"{machines[0]}/results", f"{machines[1]}/results"):
        assert part in complaint[0]
    assert "Traceback" not in "".join(outputs)
    left = [path for directory in machines for path in directory.rglob("*") if path.is_file()]
    assert left == []
