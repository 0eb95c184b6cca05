"""Where a run comes from: its id, the time, the versions and the state of the source code."""

from __future__ import annotations

import importlib.metadata
import platform
import secrets
import subprocess
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

_PACKAGES = ("torch", "accelerate", "numpy", "scipy", "safetensors", "tokenizers", "accel_train")
_REPOSITORY = Path(__file__).parents[2]


def new_run_id() -> str:
    """Return a fresh run id that sorts by time, such as ``20260314T150926-5a3f9c1e``."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(4)}"


def timestamp() -> str:
    """Return the time now as ISO 8601 in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that may change results; imports none of them."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def git_state(root: Path = _REPOSITORY) -> tuple[str | None, bool | None]:
    """Return the commit of the source checkout, and whether it has changes that are not committed.

    ``(None, None)`` without git, and where the package lies in no repository of its own (an
    installed package inside somebody else's checkout is not that checkout's code).

    Args:
        root: top of the checkout; by default the directory that holds the package.
    """
    root = root.resolve()
    lines = (_git(root, "rev-parse", "--show-toplevel", "HEAD") or "").splitlines()
    if len(lines) != 2 or Path(lines[0]).resolve() != root:
        return None, None
    changes = _git(root, "status", "--porcelain")
    return lines[1], None if changes is None else bool(changes)


def _git(root: Path, *arguments: str) -> str | None:
    command = ["git", "--no-optional-locks", "-C", str(root), *arguments]
    try:
        return subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True, timeout=20).strip()
    except (OSError, subprocess.SubprocessError):
        return None
