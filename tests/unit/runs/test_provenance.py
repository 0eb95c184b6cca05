"""Where a run says it comes from."""

import subprocess

import pytest

from accel_train import __version__
from accel_train.runs.provenance import git_state, new_run_id, versions


def git(root, *arguments):
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", "-C", root, *identity, *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path):
    git(tmp_path, "init", "--quiet")
    (tmp_path / "code.py").write_text("1")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "first")
    return tmp_path


def test_clean_checkout_is_known_by_its_commit(checkout):
    assert git_state(checkout) == (git(checkout, "rev-parse", "HEAD"), False)


def test_changed_checkout_is_dirty(checkout):
    (checkout / "code.py").write_text("2")
    assert git_state(checkout)[1] is True


def test_package_inside_another_checkout_has_no_commit(checkout):
    (checkout / "site-packages").mkdir()
    assert git_state(checkout / "site-packages") == (None, None)


def test_without_git_there_is_no_commit(tmp_path, monkeypatch):
    assert git_state(tmp_path) == (None, None)
    monkeypatch.setenv("PATH", "")
    assert git_state(tmp_path) == (None, None)


def test_versions_name_python_and_the_libraries():
    found = versions()
    assert found["accel_train"] == __version__
    assert {"python", "torch", "accelerate", "numpy"} <= found.keys()


def test_run_ids_differ_and_sort_by_time():
    first, second = new_run_id(), new_run_id()
    assert first != second
    assert first.partition("-")[0] <= second.partition("-")[0]
