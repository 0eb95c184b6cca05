"""Two "machines" on one: network namespaces joined by a pair of virtual Ethernet interfaces that can be cut."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

INTERFACE = "link0"
ADDRESSES = ("10.213.77.1", "10.213.77.2")

Cut = Literal["unplugged", "silent"]
"""``unplugged``: machine 0's interface is down, and its address with it. ``silent``: packets vanish, all looks well."""


def unavailable() -> str | None:
    """Why namespaces cannot be made here; None when they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        return f"needs {' and '.join(missing)} (Debian and Ubuntu: apt install iproute2)"
    probe = subprocess.run(["unshare", "--net", "true"], capture_output=True, text=True, check=False)
    return None if probe.returncode == 0 else f"no network namespaces here: {probe.stderr.strip()}"


class TwoMachines:
    """Namespaces ``names[0]`` and ``names[1]``; the interface of both is called ``INTERFACE``."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)

    def inside(self, machine: int, command: Sequence[str]) -> list[str]:
        """The command that runs ``command`` on a machine, in a process of the same id."""
        return ["ip", "netns", "exec", self.names[machine], *command]

    def cut(self, how: Cut) -> None:
        """Sever the link; no connection is closed by it."""
        if how == "unplugged":
            _ip("-n", self.names[0], "link", "set", INTERFACE, "down")
        else:
            for name in self.names:
                _call("tc", "-n", name, "qdisc", "add", "dev", INTERFACE, "root", "blackhole")

    def mend(self) -> None:
        """Undo every cut."""
        for name in self.names:
            _ip("-n", name, "link", "set", INTERFACE, "up")
            if "blackhole" in _call("tc", "-n", name, "qdisc", "show", "dev", INTERFACE, "root"):
                _call("tc", "-n", name, "qdisc", "del", "dev", INTERFACE, "root")

    def is_cut(self) -> bool:
        """Whether machine 1 gets no answer from machine 0; a port where nobody listens would answer at once."""
        _ip("-n", self.names[1], "neigh", "flush", "dev", INTERFACE)  # a remembered address proves nothing
        probe = self.inside(1, [sys.executable, "-c", _PROBE, ADDRESSES[0]])
        return subprocess.run(probe, check=False).returncode != 0


_PROBE = """
import errno, socket, sys
with socket.socket() as probe:
    probe.settimeout(1.0)
    sys.exit(probe.connect_ex((sys.argv[1], 9)) != errno.ECONNREFUSED)
"""


@contextmanager
def two_machines() -> Iterator[TwoMachines]:
    """Two joined machines with loopback, removed at the end."""
    tag = secrets.token_hex(3)
    machines = TwoMachines([f"accel-{tag}-{machine}" for machine in range(2)])
    try:
        for name in machines.names:
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        ends = [["name", INTERFACE, "netns", name] for name in machines.names]
        _ip("link", "add", *ends[0], "type", "veth", "peer", *ends[1])
        for name, address in zip(machines.names, ADDRESSES, strict=True):
            _ip("-n", name, "address", "add", f"{address}/24", "dev", INTERFACE)
            _ip("-n", name, "link", "set", INTERFACE, "up")
        yield machines
    finally:
        for name in machines.names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def _ip(*arguments: str) -> None:
    _call("ip", *arguments)


def _call(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr.strip()}"
    return done.stdout
