"""The pipeline's options, and what it finds out before it imports anything."""

import importlib.util
import json
import subprocess
import sys

import pytest

from accel_train.errors import EXIT_PREREQUISITES, PhaseFailed
from accel_train.pipeline import command
from accel_train.pipeline.command import (
    OPTIONS,
    OPTIONS_FILE,
    as_option,
    check_options,
    chosen_fields,
    kept_options,
    parse_options,
    recall,
)


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


# -- options: what they set, what is kept, what is refused ----------------------------------


def test_flags_are_the_contract():
    flags = {option.flag for option in OPTIONS}
    asked = (
        "--corpus-path --corpus-url --vocab-size --epochs --batch-size --learning-rate --max-seq-length --output-dir "
        "--skip-corpus --skip-tokenizer --resume"
    )
    assert set(asked.split()) <= flags


def test_options_become_fields_with_the_output_last():
    options = parse_options(["--epochs", "3", "--learning-rate", "0.01", "--output-dir", "out", "--seed", "7"])
    assert chosen_fields(options) == [
        "--training.max_epochs=3",
        "--training.learning_rate=0.01",
        "--seed=7",
        "--output_dir=out",
    ]


@pytest.mark.parametrize(
    ("field", "flag"),
    [
        ("training.max_epochs", "--epochs"),
        ("text.corpus", "--corpus-path/--corpus-url"),
        ("model.d_model", "model.d_model"),
    ],
)
def test_a_field_is_told_by_its_option(field, flag):
    assert as_option(field) == flag


def test_options_of_the_call_alone_are_not_kept():
    options = parse_options(["--epochs", "3", "--fresh", "--skip-corpus", "--output-dir", "out"])
    assert json.loads(kept_options(options)) == {"epochs": 3}


def test_resume_takes_over_what_is_not_given_now(tmp_path):
    earlier = parse_options(["--epochs", "3", "--batch-size", "8", "--output-dir", str(tmp_path)])
    (tmp_path / OPTIONS_FILE).write_bytes(kept_options(earlier))
    options = parse_options(["--resume", "--epochs", "5", "--output-dir", str(tmp_path)])
    recall(options)
    assert (options.epochs, options.batch_size) == (5, 8)


def test_another_corpus_forgets_the_digest_of_the_first(tmp_path):
    earlier = parse_options(["--corpus-path", "a", "--corpus-sha256", "0" * 64, "--output-dir", str(tmp_path)])
    (tmp_path / OPTIONS_FILE).write_bytes(kept_options(earlier))
    options = parse_options(["--resume", "--corpus-path", "b", "--output-dir", str(tmp_path)])
    recall(options)
    assert options.corpus_sha256 is None


@pytest.mark.parametrize("content", [None, "{", "3"])
def test_nothing_to_resume_is_told(tmp_path, content):
    if content is not None:
        (tmp_path / OPTIONS_FILE).write_text(content)
    with pytest.raises(PhaseFailed, match="nothing to resume"):
        recall(parse_options(["--resume", "--output-dir", str(tmp_path)]))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--nonsense"], "unrecognized arguments"),
        (["--epochs", "many"], "invalid int value"),
        (["--tokenizer", "words"], "invalid choice"),
        (["--corpus-path", "a", "--corpus-url", "b"], "not allowed with"),
    ],
)
def test_a_wrong_option_ends_the_first_phase(arguments, says):
    with pytest.raises(PhaseFailed, match=says) as caught:
        parse_options(arguments)
    assert caught.value.exit_code == EXIT_PREREQUISITES


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--launcher", "no-such-command-here x"], "there is no command"),
        (["--launcher", "accelerate 'x"], "No closing quotation"),
        (["--corpus-url", "ftp://a/b"], "must begin with http"),
        (["--tokenizer", "char", "--vocab-size", "300"], "has no meaning"),
    ],
)
def test_options_that_do_not_go_together_are_refused(arguments, says):
    with pytest.raises(PhaseFailed, match=says):
        check_options(parse_options(arguments))


def test_an_unusual_learning_rate_is_a_warning(capsys):
    check_options(parse_options(["--learning-rate", "2"]))
    assert "far above the usual" in capsys.readouterr().out
