"""The launcher of this process, and processes that this one launches: none outlives its parent unnoticed.

A parent killed with SIGKILL can tell nobody, so a child asks the kernel (Linux) for SIGTERM when its parent dies.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

_PR_SET_PDEATHSIG = 1
# `accelerate launch` sets the first for every worker, torchrun the second.
_SET_BY_LAUNCHERS = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")


def launcher_pid() -> int | None:
    """Return the process id of the launcher; None off Linux, or when the script was started by hand.

    The launcher's death concerns only those it started: ``nohup`` and ``disown`` keep working.
    """
    is_launched = any(name in os.environ for name in _SET_BY_LAUNCHERS)
    return os.getppid() if is_launched and sys.platform.startswith("linux") else None


def is_orphan_of(parent: int) -> bool:
    """Whether ``parent``, an earlier answer of :func:`launcher_pid`, is not (or no longer) the launcher."""
    return os.getppid() != parent or (parent == 1 and not _process_1_is_launcher())


def ask_for_sigterm_when_launcher_dies() -> bool:
    """Ask the kernel for SIGTERM when the launcher dies; does nothing without a launcher.

    Call it as early as possible: where orphans get another parent than process 1, the death of a launcher
    before the first call goes unnoticed.

    Returns:
        Whether the launcher is dead already.
    """
    launcher = launcher_pid()
    if launcher is None:
        return False
    _ask_for_sigterm_when_parent_dies()
    # The launcher may have died before the request was registered.
    return is_orphan_of(launcher)


def tied_to_this_process(line: Sequence[str]) -> list[str]:
    """Return a command that becomes ``line`` and gets SIGTERM when this process dies, however it dies (Linux)."""
    # Not between fork and exec: in a process with threads only signal-safe calls are allowed there.
    code = f"import sys; from {__name__} import _become; _become({os.getpid()}, sys.argv[1:])"
    return [sys.executable, "-c", code, *line]


def _become(parent: int, line: list[str]) -> None:
    _ask_for_sigterm_when_parent_dies()
    if os.getppid() == parent:  # otherwise it died before it could be asked for
        os.execvp(line[0], line)


def _ask_for_sigterm_when_parent_dies() -> None:
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def _process_1_is_launcher() -> bool:
    """As in a container whose command is the launcher itself: then process 1 is no sign of an orphan."""
    try:
        command = Path("/proc/1/cmdline").read_bytes()
    except OSError:
        return False
    return any(name in command for name in (b"accelerate", b"torchrun", b"torch.distributed"))
