"""Languages by their words, and repetition by runs of tokens."""

from __future__ import annotations

import pytest

from accel_train.tasks.text.sample_quality import language_of, repetition


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("It was the best of times, it was the worst of times", "English"),
        ("En un lugar de la Mancha, de cuyo nombre no quiero acordarme", "Spanish"),
        ("", None),
        ("1234 xyz", None),
    ],
)
def test_languages_are_told_by_their_words(text: str, language: str | None) -> None:
    assert language_of(text) == language


@pytest.mark.parametrize(
    ("tokens", "share"),
    [([], 0.0), ([1, 2, 3], 0.0), (list(range(50)), 0.0), ([1, 2] * 50, 1 - 2 / 97), ([1, 2, 3, 4, 1, 2, 3, 4], 1 / 5)],
)
def test_repetition_is_the_share_of_runs_seen_before(tokens: list[int], share: float) -> None:
    assert repetition(tokens) == pytest.approx(share)


@pytest.mark.parametrize("text", ["the de of la", "the", "THE hombre"])
def test_too_few_words_or_as_many_of_both_tell_no_language(text: str) -> None:
    assert language_of(text) is None


def test_runs_of_another_length_are_counted() -> None:
    assert repetition([1, 2, 1, 2], run=2) == pytest.approx(1 / 3)
