"""A SLURM cluster of two nodes on the loopback interface, for as long as a test needs it.

One munged, one slurmctld and two slurmd, all with their own ports, keys and directories below a
temporary directory: nothing of the system's own configuration is read or written, and neither
systemd nor cgroups are needed. Written for Debian's SLURM 22.05.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
from harness import kill_tree, wait_for

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "scontrol", "squeue", "scancel")
NODES = ("n1", "n2")
GRACE_SECONDS = 20
"""Between the signal of a preemption and its SIGKILL."""
KILL_WAIT_SECONDS = 15
"""Between the SIGTERM of a requeue, a time limit or an scancel and its SIGKILL."""

# `cred_expire` shortens the time for which a requeued job may not start again, two minutes by default.
CONFIGURATION = """\
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={home}/munge.socket,cred_expire=5
StateSaveLocation={home}/state
SlurmctldPidFile={home}/slurmctld.pid
SlurmctldLogFile={home}/slurmctld.log
SlurmdSpoolDir={home}/spool-%n
SlurmdPidFile={home}/slurmd-%n.pid
SlurmdLogFile={home}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
FirstJobId={first_job}
KillWait={kill_wait}
ReturnToService=2
SchedulerParameters=sched_interval=2,bf_interval=2,sched_min_interval=0
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
{nodes}
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace}
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF
"""


class Unavailable(RuntimeError):
    """There can be no cluster on this machine; the message says why."""


def install() -> None:
    """Install SLURM and munge where they are missing.

    Raises:
        Unavailable: not Linux, not root, or the packages cannot be installed.
    """
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        raise Unavailable("SLURM's daemons need Linux and root")
    if all(map(shutil.which, PROGRAMS)):
        return
    if shutil.which("apt-get") is None:
        raise Unavailable(f"{' '.join(PACKAGES)} are not installed, and there is no apt-get")
    for command in (["update"], ["install", "--yes", "--no-install-recommends", *PACKAGES]):
        done = subprocess.run(
            ["apt-get", "--quiet", *command],
            env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise Unavailable(f"apt-get {command[0]} failed: {done.stdout[-500:]}")


class SlurmCluster:
    """A running cluster: partition ``low`` is preempted, with a grace time, by partition ``high``.

    Args:
        home: directory of everything that belongs to it.
    """

    def __init__(self, home: Path) -> None:
        self.home = home
        self.config = home / "slurm.conf"

    def client(self, *command: str, **env: str) -> str:
        """The output of ``sbatch``, ``scontrol`` and the like, with ``env`` added to the environment."""
        done = subprocess.run(
            command,
            env=self.environment() | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{self.logs()}"
        return done.stdout

    def submit(self, *arguments: str, **env: str) -> str:
        """``sbatch`` with ``arguments``; returns the job id."""
        return self.client("sbatch", "--parsable", *arguments, **env).strip()

    def job(self, job_id: str) -> dict[str, str]:
        """The fields of ``scontrol show job``, such as JobState, Restarts and ExitCode."""
        shown = self.client("scontrol", "--oneliner", "show", "job", job_id)
        return dict(field.split("=", 1) for field in shown.split() if "=" in field)

    def logs(self) -> str:
        """The ends of the daemons' logs, for the message of a failed assertion."""
        logs = sorted(self.home.glob("*.log"))
        return "".join(f"\n--- {path.name}\n{path.read_text(errors='replace')[-4000:]}" for path in logs)

    def environment(self) -> dict[str, str]:
        """This process's environment, without any job that it may itself be a part of."""
        outside = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        return outside | {"SLURM_CONF": str(self.config)}

    def wait_until_up(self) -> None:
        """Wait for both nodes to be idle."""
        wait_for(lambda: self._states() == ["idle"] * len(NODES), f"idle nodes {self.logs()}", timeout=30)

    def _states(self) -> list[str]:
        command = ["sinfo", "--noheader", "--Node", "--partition=low", "--format=%T"]
        done = subprocess.run(command, env=self.environment(), capture_output=True, text=True, check=False)
        return done.stdout.split()

    def cancel_all(self) -> None:
        """End every job, and every process of one that is still there."""
        self.client("scancel", "--user=root")
        deadline = time.monotonic() + KILL_WAIT_SECONDS + 10
        while self.client("squeue", "--noheader") and time.monotonic() < deadline:
            time.sleep(0.2)
        for process in psutil.process_iter():
            try:
                left_behind = process.environ().get("SLURM_CONF") == str(self.config)
            except psutil.Error:
                continue
            if left_behind and process.name() not in PROGRAMS:
                kill_tree(process.pid)


@contextmanager
def running_cluster() -> Iterator[SlurmCluster]:
    """A cluster that is up on entering the block, and gone without a trace after it."""
    with ExitStack() as stack:
        # Not pytest's directory: the path of a Unix socket has at most 107 characters.
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True)))
        cluster = SlurmCluster(home)
        _write_configuration(cluster)
        for command in _daemons(home):
            stack.enter_context(_daemon(command, cluster))
            if command[0] == "munged":
                wait_for((home / "munge.socket").exists, "munged", timeout=10)
        cluster.wait_until_up()
        stack.callback(cluster.cancel_all)
        yield cluster


def _write_configuration(cluster: SlurmCluster) -> None:
    home, host = cluster.home, socket.gethostname().partition(".")[0]
    home.chmod(0o755)  # munged refuses a socket that others cannot reach
    (home / "state").mkdir()
    (home / "munge.key").write_bytes(secrets.token_bytes(128))
    (home / "munge.key").chmod(0o600)
    controller_port, *node_ports = _free_ports(1 + len(NODES))
    nodes = "\n".join(
        f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 State=UNKNOWN"
        for name, port in zip(NODES, node_ports, strict=True)
    )
    cluster.config.write_text(
        CONFIGURATION.format(
            home=home,
            host=host,
            controller_port=controller_port,
            nodes=nodes,
            grace=GRACE_SECONDS,
            kill_wait=KILL_WAIT_SECONDS,
            first_job=1 + secrets.randbelow(50_000),  # the job script derives a port from it
        )
    )


def _daemons(home: Path) -> Iterator[Sequence[str]]:
    munge = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    yield ["munged", "--foreground", "--force", *(f"--{option}={home}/munge.{end}" for option, end in munge.items())]
    yield ["slurmctld", "-D", "-f", f"{home}/slurm.conf"]
    for name in NODES:
        yield ["slurmd", "-D", "-f", f"{home}/slurm.conf", "-N", name]


@contextmanager
def _daemon(command: Sequence[str], cluster: SlurmCluster) -> Iterator[None]:
    with (cluster.home / f"{command[0]}.out.log").open("a") as output:
        process = subprocess.Popen(command, env=cluster.environment(), stdout=output, stderr=output)
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
