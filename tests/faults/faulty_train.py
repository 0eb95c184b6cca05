"""``scripts/train.py`` with the fault described in the environment.

``FAULT`` holds JSON: ``point`` and ``number`` (the fault comes when the point is reached for the
``number``-th time), ``rank`` (null: every rank), ``mark`` (a file that proves that it came) and
``do``: ``kill`` the process, ``pause`` for ``seconds``, or ``run`` a shell ``command``. Without
``FAULT`` this is the training script.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from accel_train.commands.main import train_main
from accel_train.process import fault_points
from accel_train.process.work import pass_by

POINTS = [value for name, value in vars(fault_points).items() if name.isupper()]


class Fault:
    """Comes once, at one point."""

    def __init__(self, point: str, mark: str, do: str, number: int = 1, rank: int | None = 0, **details: Any) -> None:
        if point not in POINTS:
            raise ValueError(f"{point!r} is no point of a run: {POINTS}")
        self._point, self._left, self._mark, self._do = point, number, Path(mark), getattr(self, do)
        self._is_here = rank in {None, int(os.environ.get("RANK", "0"))}
        self._details = details

    def reached(self, point: str) -> None:
        if point != self._point or not self._is_here:
            return
        self._left -= 1
        if self._left == 0:
            self._mark.touch()
            self._do(**self._details)

    def kill(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def pause(self, seconds: float) -> None:
        time.sleep(seconds)

    def run(self, command: str) -> None:
        subprocess.run(command, shell=True, check=True, executable="/bin/bash")


if __name__ == "__main__":
    described = os.environ.get("FAULT")
    sys.exit(train_main(reached=Fault(**json.loads(described)).reached if described else pass_by))
