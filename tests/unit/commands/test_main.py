"""Dispatch, the command lines that are refused, and the console script."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from accel_train.commands.main import complain, guarded, main
from accel_train.errors import EXIT_FAILED, ConfigError, Interrupted


@pytest.mark.parametrize(
    "argv", [[], ["runz"], ["generate", "x", "--num", "0"], ["generate", "x", "--num", "a"], ["evaluate"]]
)
def test_wrong_command_line_is_one_line_and_exit_2(argv, capsys):
    with pytest.raises(SystemExit) as left:
        main(argv)
    assert left.value.code == 2
    shown = capsys.readouterr().err
    assert shown.startswith("accel-train: error: ")
    assert shown.count("\n") == 1


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--top-k", "0", "'0' is not a positive whole number"),
        ("--top-p", "1.5", "'1.5' is not a number above 0 to 1"),
        ("--top-p", "0", "'0' is not a number above 0 to 1"),
        ("--temperature", "-1", "'-1' is not a number at least 0"),
        ("--temperature", "hot", "'hot' is not a number at least 0"),
    ],
)
def test_a_wrong_option_of_generate_is_one_line(option, value, says, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["generate", "results/texts", f"{option}={value}"])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_console_script_is_installed_beside_python():
    script = Path(sys.executable).parent / "accel-train"
    done = subprocess.run([script, "--help"], capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 0
    assert "runs" in done.stdout


@pytest.mark.parametrize(
    ("error", "code"),
    [(ConfigError("seed", 3, "is odd"), 2), (Interrupted("stopped"), 75), (OSError("disk full"), EXIT_FAILED)],
    ids=["configuration", "interruption", "system"],
)
def test_an_error_is_one_line_and_its_own_exit_code(error, code, capsys):
    def fail():
        raise error

    assert guarded(fail) == code
    assert capsys.readouterr() == ("", f"accel-train: error: {error}\n")


def test_a_defect_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        guarded(lambda: 1 // 0)


def test_a_message_of_several_lines_is_told_in_one(capsys):
    assert complain("one\n  two", 1) == 1
    assert capsys.readouterr().err == "accel-train: error: one two\n"


def test_a_reader_that_is_gone_is_no_traceback():
    """As in ``accel-train runs | head -0``."""
    script = (
        "import os, sys\n"
        "from accel_train.commands.main import guarded\n"
        "read, write = os.pipe()\nos.close(read)\nos.dup2(write, 1)\n"
        "def show():\n    print('x' * 100_000, flush=True)\n    return 0\n"
        "sys.exit(guarded(show))"
    )
    done = subprocess.run([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (EXIT_FAILED, "")
