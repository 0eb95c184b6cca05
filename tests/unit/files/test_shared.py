"""Shared directories are built once, complete, and verified by everyone else."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from accel_train.errors import Interrupted
from accel_train.files import sealed, shared
from accel_train.files.shared import INDEX_FILE, cached, damage
from accel_train.process.fault_points import CORPUS_BEGUN, CORPUS_BUILT
from accel_train.process.work import WorkContext

BUILD_AND_STALL = """
import sys
from pathlib import Path
from accel_train.files.shared import cached

def build(directory):
    (directory / "a.bin").write_bytes(b"half of it")
    print("building", flush=True)
    sys.stdin.read()

cached(Path(sys.argv[1]), sys.argv[2], build)
"""

BUILD_SLOWLY = """
import sys, uuid
from pathlib import Path
from accel_train.files.shared import cached

def build(directory):
    print("building", flush=True)
    sys.stdin.read()
    (directory / "a.bin").write_bytes(uuid.uuid4().bytes)

print(cached(Path(sys.argv[1]), "key", build).joinpath("a.bin").read_bytes().hex(), flush=True)
"""


def build(directory: Path) -> None:
    (directory / "a.bin").write_bytes(b"content")
    (directory / "sub").mkdir()
    (directory / "sub" / "b.txt").write_text("more")


def must_not_build(_directory: Path) -> None:
    pytest.fail("built again")


def visible(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.suffix != ".lock")


def start(script: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def test_artifact_is_built_with_an_index_and_found_again(tmp_path):
    root = tmp_path / "shared"
    path = cached(root, "key", build)

    assert path == root / "key"
    assert set(json.loads((path / INDEX_FILE).read_text())["files"]) == {"a.bin", "sub/b.txt"}
    assert cached(root, "key", must_not_build) == path
    assert visible(root) == ["key"]


def test_artifacts_of_other_keys_are_their_own(tmp_path):
    first, second = cached(tmp_path, "a", build), cached(tmp_path, "b", build)
    assert first != second
    assert damage(first) is None
    assert damage(second) is None


def flip_a_bit(path: Path) -> None:
    content = bytearray((path / "a.bin").read_bytes())
    content[3] ^= 1
    (path / "a.bin").write_bytes(content)


DAMAGE = {
    "flipped bit": flip_a_bit,
    "truncated file": lambda path: os.truncate(path / "a.bin", 3),
    "missing file": lambda path: (path / "sub" / "b.txt").unlink(),
    "no index": lambda path: (path / INDEX_FILE).unlink(),
    "torn index": lambda path: os.truncate(path / INDEX_FILE, 20),
    "index that is a list": lambda path: (path / INDEX_FILE).write_text("[]"),
    "other format": lambda path: (path / INDEX_FILE).write_text('{"format_version": 0, "files": {}}'),
}


@pytest.mark.parametrize("harm", DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_artifact_is_named_and_built_again(tmp_path, caplog, harm):
    path = cached(tmp_path, "key", build)
    harm(path)
    assert damage(path) is not None

    cached(tmp_path, "key", build)

    assert str(path) in caplog.text
    assert damage(path) is None
    assert (path / "a.bin").read_bytes() == b"content"
    assert visible(tmp_path) == ["key"]


def test_a_file_that_somebody_left_there_damages_nothing(tmp_path):
    path = cached(tmp_path, "key", build)
    (path / ".DS_Store").write_text("a file manager was here")
    before = (path / "a.bin").stat().st_mtime_ns
    cached(tmp_path, "key", build)
    assert (path / "a.bin").stat().st_mtime_ns == before


def test_failed_build_leaves_nothing_and_passes_its_error_on(tmp_path):
    def fail(directory):
        build(directory)
        raise Interrupted("in the middle")

    with pytest.raises(Interrupted, match="in the middle"):
        cached(tmp_path, "key", fail)

    assert visible(tmp_path) == []
    assert damage(cached(tmp_path, "key", build)) is None


def test_name_is_given_only_when_everything_is_on_disk(tmp_path, monkeypatch):
    events = []
    for name in ("fsync_file", "fsync_directory", "write_atomic"):
        primitive = getattr(sealed, name)
        monkeypatch.setattr(
            sealed,
            name,
            lambda path, *content, primitive=primitive: (
                events.append((path.name, (tmp_path / "key").exists())),
                primitive(path, *content),
            ),
        )

    cached(tmp_path, "key", build)

    before, after = [event for event, committed in events if not committed], events[-1]
    assert before == ["a.bin", "b.txt", "sub", INDEX_FILE]
    assert after == (tmp_path.name, True)


@pytest.mark.parametrize("next_key", ["key", "another"])
def test_builder_killed_in_the_middle_leaves_nothing_that_counts(tmp_path, next_key):
    builder = start(BUILD_AND_STALL, tmp_path, "key")
    assert builder.stdout.readline() == "building\n"
    builder.kill()
    builder.communicate()
    assert len(visible(tmp_path)) == 1
    assert not (tmp_path / "key").exists()

    cached(tmp_path, next_key, build)

    assert visible(tmp_path) == [next_key]
    assert (tmp_path / next_key / "a.bin").read_bytes() == b"content"


def test_sweeping_spares_a_live_builder(tmp_path):
    builder = start(BUILD_AND_STALL, tmp_path, "key")
    try:
        assert builder.stdout.readline() == "building\n"

        cached(tmp_path, "another", build)

        assert len(visible(tmp_path)) == 2
        builder.communicate("")
        assert builder.returncode == 0
        assert damage(tmp_path / "key") is None
    finally:
        builder.kill()


def test_two_builders_at_once_build_once(tmp_path):
    first = start(BUILD_SLOWLY, tmp_path)
    assert first.stdout.readline() == "building\n"
    second = start(BUILD_SLOWLY, tmp_path)
    try:
        got, _ = first.communicate("")
        also, _ = second.communicate("")
    finally:
        first.kill()
        second.kill()

    assert got == also  # the second did not even say "building"
    assert len(got.strip()) == 32


def test_waiting_is_reported_bounded_and_can_be_stopped(tmp_path, monkeypatch):
    builder = start(BUILD_AND_STALL, tmp_path, "key")
    lines = []
    work = WorkContext(say=lambda phase, what: lines.append((phase, what)))
    try:
        assert builder.stdout.readline() == "building\n"
        monkeypatch.setattr(shared, "_LOCK_SECONDS", 0.2)
        with pytest.raises(TimeoutError, match="locked by another process"):
            cached(tmp_path, "key", must_not_build, work, "tokens")
        with pytest.raises(Interrupted):
            cached(tmp_path, "key", must_not_build, WorkContext(should_stop=lambda: True))
    finally:
        builder.kill()
        builder.communicate()
    assert [phase for phase, _ in lines] == ["tokens"]
    assert str(tmp_path / "key") in lines[0][1]


def test_kill_during_removal_of_a_damaged_artifact(tmp_path, monkeypatch):
    path = cached(tmp_path, "key", build)
    flip_a_bit(path)

    class Killed(BaseException):
        pass

    def killed(_directory, **_options):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(Killed):
            cached(tmp_path, "key", must_not_build)
    assert not path.exists()

    cached(tmp_path, "key", build)
    assert visible(tmp_path) == ["key"]


@pytest.mark.parametrize("damaged", [False, True])
def test_artifact_of_another_host_that_was_first(tmp_path, damaged):
    """Where the lock does not reach the other host: a sound directory is used, a damaged one is an error."""

    def build_late(directory):
        (directory / "a.bin").write_bytes(b"mine")
        other = tmp_path / "other" / "key"
        cached(other.parent, "key", build)
        if damaged:
            flip_a_bit(other)
        other.rename(root / "key")

    root = tmp_path / "root"
    if damaged:
        with pytest.raises(OSError, match="could not be built"):
            cached(root, "key", build_late)
    else:
        assert (cached(root, "key", build_late) / "a.bin").read_bytes() == b"content"
    assert visible(root) == ["key"]


def test_fault_points_are_passed_on_in_order(tmp_path):
    reached = []
    cached(tmp_path, "key", lambda _: reached.append("build"), WorkContext(reached=reached.append))
    assert reached == [CORPUS_BEGUN, "build", CORPUS_BUILT]


@pytest.mark.parametrize("key", ["", ".hidden", "a/b"])
def test_key_must_be_a_plain_name(tmp_path, key):
    with pytest.raises(ValueError, match="key"):
        cached(tmp_path, key, must_not_build)
