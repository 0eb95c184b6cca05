"""The alphabet of the character tokenizer, and line ends."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accel_train.tasks.text.corpus import unify_line_ends
from accel_train.tasks.text.tokenizer import ALPHABET, UNKNOWN, normalize_text


def test_the_alphabet_is_tab_newline_and_printable_ascii() -> None:
    assert list(map(ord, ALPHABET)) == [9, 10, *range(32, 127)]


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("", ""),
        ("Plain text,\n\twith a tab.", "Plain text,\n\twith a tab."),
        ("\x00\x1f\x7f\r", UNKNOWN * 4),
        ("año", f"a{UNKNOWN}o"),
        ("\N{GRINNING FACE}", UNKNOWN),
    ],
)
def test_everything_else_becomes_the_unknown_character(text: str, normalized: str) -> None:
    assert normalize_text(text) == normalized


@given(st.text())
def test_normalizing_keeps_the_length_and_is_done_after_once(text: str) -> None:
    once = normalize_text(text)
    assert len(once) == len(text)
    assert normalize_text(once) == once


def test_line_ends_of_all_systems_become_one() -> None:
    assert unify_line_ends("dos\r\nmac\runix\n\r\n\r") == "dos\nmac\nunix\n\n\n"
