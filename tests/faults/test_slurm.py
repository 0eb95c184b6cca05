"""The job script on a SLURM cluster of two nodes: preempted, requeued, and finished with the same bits."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import ROOT, metrics, outcome, record, run, run_dir, wait_for, write_config
from slurm_cluster import SlurmCluster, Unavailable, install, running_cluster

pytestmark = pytest.mark.slow

JOB_SCRIPT = ROOT / "scripts" / "slurm" / "train.sbatch"
QUICK_RUN = ROOT / "examples" / "walks_quick.yaml"


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    try:
        install()
    except Unavailable as reason:
        pytest.skip(str(reason))
    with running_cluster() as up:
        yield up


class Job:
    """A submitted training job and its run directory."""

    def __init__(self, cluster: SlurmCluster, directory: Path, *options: str) -> None:
        self.cluster, self.results, self.log = cluster, directory / "results", directory / "job.log"
        self.id = cluster.submit(
            "--partition=low", "--nodes=2", "--ntasks-per-node=1", f"--chdir={ROOT}", f"--output={self.log}", *options,
            str(JOB_SCRIPT), "--config", str(QUICK_RUN), "--output_dir", str(self.results),
            PYTHON=sys.executable, MASTER_ADDR="127.0.0.1",
        )  # fmt: skip

    def story(self) -> str:
        """What a failed assertion should show."""
        shown = self.log.read_text(errors="replace") if self.log.exists() else "(no output yet)"
        return f"{self.cluster.job(self.id)}\n{shown}{self.cluster.logs()}"

    def wait(self, condition, what: str, timeout: float = 60) -> None:
        try:
            wait_for(condition, what, timeout)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.story()}") from None

    def step(self) -> int:
        try:
            return max((line["step"] for line in metrics(self.results)), default=0)
        except (AssertionError, FileNotFoundError, ValueError):
            return 0

    def status(self) -> str:
        try:
            return str(record(self.results)["status"])
        except (AssertionError, FileNotFoundError, json.JSONDecodeError):
            return "none"

    def state(self) -> str:
        return self.cluster.job(self.id)["JobState"]

    def trains_beyond(self, step: int) -> bool:
        return self.status() == "running" and self.state() == "RUNNING" and self.step() > step


def test_a_preempted_and_requeued_job_finishes_under_its_id_with_the_same_bits(
    cluster: SlurmCluster, tmp_path: Path
) -> None:
    job = Job(cluster, tmp_path)
    job.wait(lambda: job.trains_beyond(30), "the first steps")

    intruder = cluster.submit("--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap", "sleep 2")
    job.wait(lambda: job.status() == "preempted", "the answer to the preemption", timeout=30)
    at_preemption = len(record(job.results)["curves"]["train_loss"])
    assert at_preemption > 30
    job.wait(lambda: cluster.job(intruder)["JobState"] == "COMPLETED", "the job of the higher partition")

    job.wait(lambda: job.trains_beyond(at_preemption + 30), "the second run of the job")
    cluster.client("scontrol", "requeue", job.id)
    job.wait(lambda: job.status() == "preempted", "the answer to the requeue", timeout=30)
    at_requeue = len(record(job.results)["curves"]["train_loss"])
    assert at_requeue > at_preemption + 30

    job.wait(lambda: job.state() == "COMPLETED", "the end of the job", timeout=240)
    assert job.status() == "completed", job.story()
    assert cluster.job(job.id)["Restarts"] == "2", job.story()
    log = job.log.read_text()
    assert [f"restart {n}, " in log for n in range(4)] == [True, True, True, False], "one log, appended by every run"
    assert log.count("requeueing the job") == 1, "only the preempted job has to put itself back into the queue"
    found = record(job.results)["provenance"]
    assert [resume["step"] for resume in found["resumes"]] == [at_preemption, at_requeue], "a step was lost"
    assert found["world_sizes"] == [2, 2, 2]
    assert (run_dir(job.results) / "logs" / "rank_1.log").exists()

    undisturbed = tmp_path / "undisturbed"
    run(write_config(tmp_path / "c.yaml", {"output_dir": str(undisturbed)}), 2, "--config", str(QUICK_RUN))
    assert outcome(job.results) == outcome(undisturbed)


def test_a_job_that_cannot_succeed_is_not_requeued(cluster: SlurmCluster, tmp_path: Path) -> None:
    log = tmp_path / "job.log"
    job_id = cluster.submit(
        "--partition=low", f"--chdir={ROOT}", f"--output={log}", str(JOB_SCRIPT), "--training.batch_size", "0",
        PYTHON=sys.executable,
    )  # fmt: skip
    wait_for(lambda: cluster.job(job_id)["JobState"] == "FAILED", f"the end of the job {cluster.logs()}", timeout=60)
    assert cluster.job(job_id)["ExitCode"] == "2:0"
    assert cluster.job(job_id)["Restarts"] == "0"
    assert "training.batch_size: 0" in log.read_text()
    assert "training ended with code 2" in log.read_text()
