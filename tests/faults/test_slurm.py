"""The job script on a real SLURM cluster: preempted, requeued and out of time, it ends with the same bits."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import ROOT, TINY, checkpoints, metrics, outcome, record, run, wait_for, write_config
from slurm_cluster import SlurmCluster, Unavailable, install, running_cluster

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

QUICK = ROOT / "examples" / "walks_quick.yaml"
LONG = {"training": {"max_epochs": 10_000, "log_interval": 2}}


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    try:
        install()
    except Unavailable as reason:
        pytest.skip(str(reason))
    with running_cluster() as cluster:
        yield cluster


class Job:
    """The job script, submitted to partition ``low`` as two nodes with one process each."""

    def __init__(self, cluster: SlurmCluster, home: Path, config: Path, *options: str, **env: str) -> None:
        self.cluster, self.results, self.log = cluster, home / "results", home / "job.log"
        self.id = cluster.submit(
            *("--partition=low", "--nodes=2", f"--output={self.log}", f"--chdir={ROOT}", *options),
            *("scripts/slurm/train.sbatch", "--config", str(config), "--output_dir", str(self.results)),
            # Two nodes of one host: their names mean nothing to the resolver.
            **{"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "PYTHON": sys.executable, **env},
        )

    @property
    def state(self) -> str:
        return self.cluster.job(self.id)["JobState"]

    @property
    def restarts(self) -> int:
        return int(self.cluster.job(self.id)["Restarts"])

    @property
    def output(self) -> str:
        return self.log.read_text() if self.log.exists() else "(nothing)"

    def logged_step(self) -> int:
        try:
            return max((line["step"] for line in metrics(self.results)), default=0)
        except (AssertionError, FileNotFoundError, ValueError):
            return 0  # not there yet, or a line half written

    def wait_for(self, condition, what: str, timeout: float = 60) -> None:
        try:
            wait_for(condition, what, timeout)
        except AssertionError as error:
            raise AssertionError(
                f"{error}; job {self.cluster.job(self.id)}\n--- {self.log}\n{self.output}{self.cluster.logs()}"
            ) from None

    def wait_until_training(self, step: int) -> None:
        """Wait for ``step`` to be logged by a job that is running and not finished."""
        self.wait_for(lambda: self.logged_step() >= step, f"step {step}")
        assert self.state == "RUNNING", self.output
        assert record(self.results)["status"] == "running", self.output

    def wait_until_preempted(self, restarts: int) -> int:
        """Wait for the job's restart to be decided and its state saved; returns the step saved."""
        self.wait_for(lambda: self.restarts == restarts, f"requeue number {restarts}")
        self.wait_for(lambda: record(self.results)["status"] == "preempted", "the record to say so")
        step = len(record(self.results)["curves"]["train_loss"])
        assert checkpoints(self.results)[-1].name == f"step_{step:07d}", self.output
        return step

    def wait_until_over(self, timeout: float = 60) -> str:
        """Wait for the job's end; returns its state."""
        over = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "PREEMPTED"}
        self.wait_for(lambda: self.state in over, "the end of the job", timeout)
        return self.state


def test_the_quick_run_is_preempted_and_requeued_and_ends_with_the_same_bits(
    cluster: SlurmCluster, tmp_path: Path
) -> None:
    untouched = tmp_path / "untouched"
    run(QUICK, 2, "--output_dir", str(untouched), timeout=300)
    job = Job(cluster, tmp_path, QUICK)

    job.wait_until_training(step=60)
    cluster.submit("--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")
    preempted = job.wait_until_preempted(restarts=1)
    assert preempted >= 60
    assert "requeueing the job" in job.output, "in the grace time the script has to ask for it"

    job.wait_until_training(step=preempted + 60)
    cluster.client("scontrol", "requeue", job.id)
    requeued = job.wait_until_preempted(restarts=2)
    assert requeued >= preempted + 60
    job.wait_for(lambda: "what becomes of it is decided" in job.output, "the script to leave it at that")
    assert job.output.count("requeueing the job") == 1

    assert job.wait_until_over(timeout=240) == "COMPLETED", job.output
    assert "restart 2," in job.output
    found = record(job.results)
    assert found["status"] == "completed"
    assert found["gate"]["passed"]
    assert [resume["step"] for resume in found["provenance"]["resumes"]] == [preempted, requeued]
    assert outcome(job.results) == outcome(untouched)


def test_before_its_time_limit_a_job_saves_and_comes_back_and_once_cancelled_it_does_not(
    cluster: SlurmCluster, tmp_path: Path
) -> None:
    config = write_config(tmp_path / "c.yaml", TINY, LONG)
    job = Job(cluster, tmp_path, config, "--time=1", "--signal=USR1@20")
    job.wait_until_training(step=6)
    saved = job.wait_until_preempted(restarts=1)
    assert "stopped with code 75; requeueing the job" in job.output

    cluster.client("scontrol", "update", f"JobId={job.id}", "TimeLimit=30")
    job.wait_until_training(step=saved + 4)
    assert [resume["step"] for resume in record(job.results)["provenance"]["resumes"]] == [saved]
    cluster.client("scancel", job.id)
    assert job.wait_until_over() == "CANCELLED", job.output
    assert "what becomes of it is decided" in job.output
    assert record(job.results)["status"] == "preempted", "a cancelled run can be submitted again"
    assert job.restarts == 1


def test_a_job_that_has_had_its_restarts_ends_with_75(cluster: SlurmCluster, tmp_path: Path) -> None:
    job = Job(cluster, tmp_path, write_config(tmp_path / "c.yaml", TINY, LONG), MAX_RESTARTS="0")
    job.wait_until_training(step=6)
    cluster.client("scancel", "--signal=USR1", job.id)
    assert job.wait_until_over() == "FAILED", job.output
    assert cluster.job(job.id)["ExitCode"] == "75:0"
    assert "not requeued: 0 restarts are enough" in job.output
    assert record(job.results)["status"] == "preempted"


def test_one_task_forms_no_group_and_a_users_mistake_keeps_its_code(cluster: SlurmCluster, tmp_path: Path) -> None:
    short = write_config(tmp_path / "c.yaml", TINY, {"training": {"max_epochs": 1}})
    job = Job(cluster, tmp_path, short, "--nodes=1", "--ntasks=1")
    assert job.wait_until_over() == "COMPLETED", job.output
    assert ", 1 process\n" in job.output

    wrong = write_config(tmp_path / "d.yaml", TINY, {"training": {"batch_size": 0}})
    job = Job(cluster, tmp_path / "wrong", wrong, "--nodes=1", f"--output={tmp_path}/wrong.log")
    assert job.wait_until_over() == "FAILED"
    assert cluster.job(job.id)["ExitCode"] == "2:0"
