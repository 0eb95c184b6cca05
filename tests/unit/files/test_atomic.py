"""Files are whole or absent."""

import hashlib
import os
import stat

import pytest

from accel_train.files.atomic import fsync_directory, fsync_file, sha256_file, write_atomic


def names(directory):
    return [path.name for path in directory.iterdir()]


def test_digest_is_that_of_the_content(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"x" * 1_000_003)

    assert sha256_file(path) == hashlib.sha256(b"x" * 1_000_003).hexdigest()


def test_atomic_write_replaces_the_content(tmp_path):
    path = tmp_path / "a"

    write_atomic(path, b"old")
    write_atomic(path, b"new")

    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["a"]


def test_failed_write_keeps_the_old_content(tmp_path, monkeypatch):
    path = tmp_path / "a"
    write_atomic(path, b"old")
    calls = []

    def full_disk(_descriptor):
        calls.append(1)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, b"new")

    assert calls
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


def test_next_write_replaces_leftovers_of_a_killed_writer(tmp_path, monkeypatch):
    path = tmp_path / "a"

    class Killed(BaseException):
        pass

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.unlink", lambda *_a, **_k: None)
        patch.setattr("pathlib.Path.replace", lambda *_a: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            write_atomic(path, b"first")
    assert len(names(tmp_path)) == 1

    write_atomic(path, b"second")

    assert names(tmp_path) == ["a"]


def test_content_is_on_disk_before_the_name_changes(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, type(tmp_path).replace

    def record_fsync(descriptor):
        events.append("directory" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr("pathlib.Path.replace", lambda *args: (events.append("rename"), replace(*args))[1])

    write_atomic(tmp_path / "a", b"content")

    assert events == ["file", "rename", "directory"]


def test_fsync_of_files_and_directories(tmp_path):
    (tmp_path / "a").write_bytes(b"x")

    fsync_file(tmp_path / "a")
    fsync_directory(tmp_path)

    with pytest.raises(FileNotFoundError):
        fsync_file(tmp_path / "missing")
    with pytest.raises(NotADirectoryError):
        fsync_directory(tmp_path / "a")
