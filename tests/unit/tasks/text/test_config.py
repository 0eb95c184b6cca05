"""The section of the text task: defaults that depend on the tokenizer, and refusals."""

import pytest
from configs import experiment_config

from accel_train.errors import ConfigError
from accel_train.tasks.text.config import GateConfig, TextConfig


@pytest.mark.parametrize(
    ("tokenizer", "fraction", "split", "slug"),
    [("char", 0.05, "tail", "char"), ("bpe", 0.1, "blocks", "bpe8000"), ("unigram", 0.1, "blocks", "unigram8000")],
)
def test_defaults_follow_the_tokenizer(tokenizer, fraction, split, slug):
    text = TextConfig(tokenizer=tokenizer)
    assert (text.held_out_fraction, text.split_by, text.slug) == (fraction, split, slug)


def test_given_values_win_over_those_of_the_tokenizer():
    text = TextConfig(tokenizer="char", val_fraction=0.2, split="blocks")
    assert (text.held_out_fraction, text.split_by) == (0.2, "blocks")


def test_a_passed_gate_does_not_end_training_by_default():
    assert GateConfig().stop_on_pass is False


WRONG = [
    ({"corpus": " "}, "text.corpus", "must name a file"),
    ({"corpus_sha256": "abc"}, "text.corpus_sha256", "64 hexadecimal digits"),
    ({"vocab_size": 260}, "text.vocab_size", "more than 260"),
    ({"vocab_size": 2**20 + 1}, "text.vocab_size", "at most 1048576"),
    ({"val_fraction": 1.0}, "text.val_fraction", "(0, 1), or null"),
    ({"stride": 0}, "text.stride", "at least 1"),
    ({"prompt": ""}, "text.prompt", "must not be empty"),
    ({"top_p": 0.0}, "text.top_p", "(0, 1]"),
    ({"download_timeout": 0.0}, "text.download_timeout", "positive"),
]


@pytest.mark.parametrize(("values", "field", "cure"), WRONG, ids=[row[1] for row in WRONG])
def test_wrong_value_is_refused_with_a_cure(values, field, cure):
    with pytest.raises(ConfigError) as caught:
        TextConfig(**values)
    assert caught.value.field == field
    assert cure in str(caught.value)


def test_the_char_tokenizer_has_no_smallest_vocabulary():
    assert TextConfig(tokenizer="char", vocab_size=5).slug == "char"


def test_a_corpus_whose_name_is_no_utf8_is_refused():
    with pytest.raises(ConfigError, match=r"text\.corpus"):
        experiment_config(task="text", text=TextConfig(corpus="\udcff"))
