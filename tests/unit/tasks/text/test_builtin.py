"""The built-in corpus: its size, that it can be repeated, and its two languages."""

from __future__ import annotations

import itertools
import tracemalloc

import pytest

from accel_train.tasks.text.builtin import builtin_text
from accel_train.tasks.text.sample_quality import language_of


@pytest.mark.parametrize("size", [1, 1000, 300_000])
def test_it_has_about_the_size_asked_for(size: int) -> None:
    made = sum(len(piece.encode()) for piece in builtin_text(size, 0))
    assert size <= made < size + 5000


def test_the_same_arguments_give_the_same_text_and_a_longer_one_begins_with_it() -> None:
    short, again, long = ("".join(builtin_text(size, 7)) for size in (50_000, 50_000, 100_000))
    assert short == again
    assert long.startswith(short.rstrip("\n"))
    assert short != "".join(builtin_text(50_000, 8))


def test_both_languages_take_turns_and_are_recognised() -> None:
    text = "".join(builtin_text(200_000, 0))
    found = [language_of(paragraph) for paragraph in text.split("\n") if paragraph]
    assert found.count(None) < 0.05 * len(found)
    share = found.count("English") / len(found)
    assert 0.4 < share < 0.6
    chapters = [name for name, _ in itertools.groupby(name for name in found if name)]
    assert len(chapters) > 50


def test_no_text_has_to_fit_in_memory() -> None:
    tracemalloc.start()
    for _ in builtin_text(3_000_000, 0):
        pass
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000
