"""Runs in odd places and at odd times: other mounts, other alphabets, clocks that go backwards."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from faults import check_finished_like, check_intact, configured, fault, slow, train, undisturbed
from harness import record, run_dir

from accel_train.checkpoints.manifest import list_checkpoints
from accel_train.process.fault_points import COMMIT_SEALED, STEP_DONE
from accel_train.runs.lock import OWNER_FILE

DAY = timedelta(days=1)
SHIFTED_CLOCK = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <time.h>
/* The wall clock stands SHIFT seconds ahead; clocks that measure durations are left alone. */
int clock_gettime(clockid_t id, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int failed = real(id, now);
    if (!failed && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) now->tv_sec += atol(getenv("SHIFT"));
    return failed;
}
time_t time(time_t *into) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (into) *into = now.tv_sec;
    return now.tv_sec;
}
"""


@pytest.fixture
def other_mount(tmp_path: Path) -> Iterator[Path]:
    """A directory on another file system than ``tmp_path``."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK) or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs /dev/shm on a file system of its own")
    with tempfile.TemporaryDirectory(dir=memory) as name:
        yield Path(name)


@pytest.fixture
def tomorrow(tmp_path: Path) -> dict[str, str]:
    """The environment of a process whose wall clock is a day ahead."""
    source, library = tmp_path / "clock.c", tmp_path / "clock.so"
    source.write_text(SHIFTED_CLOCK)
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler, to set the clock of a process")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return {"LD_PRELOAD": str(library), "SHIFT": str(int(DAY.total_seconds()))}


@slow
@pytest.mark.parametrize("world", [0, 2])
def test_results_on_another_mount_than_temporary_files(tmp_path: Path, other_mount: Path, world: int) -> None:
    expected = undisturbed(world, tmp_path)
    config, results = configured(other_mount)
    temporary, mark = tmp_path / "tmp", tmp_path / "killed"
    temporary.mkdir()
    env = {name: str(temporary) for name in ("TMPDIR", "TEMP", "TMP")}

    output = train(config, world, expect=None, FAULT=fault(COMMIT_SEALED, mark, number=9), fresh=True, **env)
    assert mark.exists(), output
    check_intact(results)
    train(config, world, fresh=True, **env)

    check_finished_like(results, expected)
    assert results.stat().st_dev != temporary.stat().st_dev


@slow
def test_a_path_with_spaces_and_other_alphabets_on_two_processes(tmp_path: Path) -> None:
    expected = undisturbed(2, tmp_path)
    strange = tmp_path / "läufe von heute 実験 'é' $HOME"
    strange.mkdir()
    config, results = configured(strange, {"name": "ein Lauf ß"}, results="Ergebnisse ñ")
    mark = strange / "getötet"

    output = train(config, 2, expect=None, FAULT=fault(STEP_DONE, mark, number=35, rank=1))
    assert mark.exists(), output
    check_intact(results)
    train(config, 2)

    check_finished_like(results, expected)
    assert run_dir(results).name == "ein Lauf ß"


@slow
@pytest.mark.parametrize("world", [0, 2])
def test_a_clock_that_goes_back_a_day_between_two_launches(tmp_path: Path, tomorrow, world: int) -> None:
    expected = undisturbed(world, tmp_path)
    config, results = configured(tmp_path)
    mark = tmp_path / "killed"

    output = train(config, world, expect=None, FAULT=fault(STEP_DONE, mark, number=50), fresh=True, **tomorrow)
    assert mark.exists(), output
    now = datetime.now(UTC)
    created = datetime.fromisoformat(record(results)["created_at"])
    owner = json.loads((run_dir(results) / OWNER_FILE).read_text())
    assert created > now + DAY / 2, "the first launch ran tomorrow"
    assert datetime.fromisoformat(owner["started_at"]) > now + DAY / 2
    # Times of files come from the kernel, whose clock was right.
    for path in [results, *results.rglob("*")]:
        os.utime(path, times=(created.timestamp(), created.timestamp()))
    before = list_checkpoints(run_dir(results) / "checkpoints")
    train(config, world)

    check_finished_like(results, expected)
    found = record(results)
    assert found["provenance"]["resumes"][0]["step"] == before[-1][0]
    assert datetime.fromisoformat(found["created_at"]) == created
    assert datetime.fromisoformat(found["finished_at"]) < created
    assert all(seconds >= 0 for seconds in found["timing"]["seconds"].values())


@pytest.mark.parametrize("host", ["here", pytest.param("elsewhere", marks=slow)])
def test_a_stale_lock_from_the_future_is_taken_over(tmp_path: Path, killed_run, host: str) -> None:
    expected = undisturbed(0, tmp_path)
    config, results = killed_run(0, tmp_path)
    owner_file = run_dir(results) / OWNER_FILE
    owner = json.loads(owner_file.read_text())
    future = datetime.now(UTC) + 365 * DAY
    name = socket.gethostname() if host == "here" else "no-such-host"
    owner_file.write_text(json.dumps(owner | {"host": name, "started_at": future.isoformat(), "heartbeat": 10**6}))
    for file in (owner_file, run_dir(results) / ".lock"):
        os.utime(file, times=(future.timestamp(), future.timestamp()))

    started = time.monotonic()
    output = train(config, 0)

    check_finished_like(results, expected)
    if host == "here":
        assert "waiting for" not in output, "that process is dead, whatever its file says"
    else:
        assert f"waiting for process {owner['pid']} on host no-such-host" in output
        assert time.monotonic() - started > 30, "its heartbeat is watched before it counts as dead"
