"""The table of options: what they set, what is kept, what is refused."""

import json

import pytest

from accel_train.errors import EXIT_PREREQUISITES, PhaseFailed
from accel_train.pipeline.options import (
    OPTIONS,
    OPTIONS_FILE,
    as_option,
    check_options,
    chosen_fields,
    kept_options,
    parse_options,
    recall,
)


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
