"""What the pipeline finds out before it imports anything."""

import importlib.util
import subprocess
import sys

import pytest

from accel_train.errors import PhaseFailed
from accel_train.pipeline import command


def test_a_missing_package_is_named(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None if name == "tokenizers" else find(name))
    with pytest.raises(PhaseFailed, match=r"has no package tokenizers; run 'make setup'"):
        command.check_python()


def test_an_old_python_is_refused(monkeypatch):
    monkeypatch.setattr(command, "_OLDEST_PYTHON", (99, 0))
    with pytest.raises(PhaseFailed, match=r"is too old; use 99\.0 or newer"):
        command.check_python()


def test_the_output_directory_is_made_and_left_clean(tmp_path):
    command.check_output(str(tmp_path / "a" / "b"))
    assert list((tmp_path / "a" / "b").iterdir()) == []


@pytest.mark.parametrize("name", ["", "  "])
def test_an_empty_output_directory_is_refused(name):
    with pytest.raises(PhaseFailed, match="is empty"):
        command.check_output(name)


def test_a_file_in_the_way_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PhaseFailed, match="cannot be written: Not a directory"):
        command.check_output(str(tmp_path / "file" / "out"))


def test_no_package_is_needed_to_say_that_one_is_missing():
    """In an interpreter that finds nothing but the standard library and this package's source."""
    script = (
        "import builtins, sys\n"
        "real = builtins.__import__\n"
        "def only_ours(name, *rest):\n"
        "    if name.partition('.')[0] in {'torch', 'numpy', 'pydantic', 'yaml', 'tqdm', 'filelock', 'psutil'}:\n"
        "        raise ImportError(name)\n"
        "    return real(name, *rest)\n"
        "builtins.__import__ = only_ours\n"
        "import importlib.util\n"
        "importlib.util.find_spec = lambda name: None\n"
        "from accel_train.commands.main import main\n"
        "sys.exit(main(['pipeline', '--output-dir', '/tmp']))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "has no package torch, accelerate" in done.stderr
