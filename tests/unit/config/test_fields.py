"""Sections as such: limits at the field, and the way to plain values and back."""

import dataclasses
from typing import Annotated, Literal

import pytest
from annotated_types import Le

from accel_train.config.fields import (
    Count,
    CountOrZero,
    Fraction,
    FractionBelowOne,
    NotNegative,
    Positive,
    PositiveFraction,
    check_value,
    expected,
    field_types,
    from_dict,
    neutral,
    result_values,
    section,
    to_dict,
)
from accel_train.errors import ConfigError


@section("part")
class Part:
    """A section in a section."""

    width: Count = 4
    """How wide."""
    rates: tuple[FractionBelowOne, ...] = (0.5,)
    """How fast."""


@section("")
class Whole:
    """A configuration."""

    seed: int = 1
    """Where it starts."""
    note: str = neutral(default="")
    """For people."""
    part: Part = dataclasses.field(default_factory=Part)
    """The part."""


LIMITS = [
    (Count, 0, "must be at least 1"),
    (CountOrZero, -1, "must not be negative"),
    (Positive, 0.0, "must be positive"),
    (NotNegative, -0.1, "must not be negative"),
    (Fraction, 1.1, "must lie in [0, 1]"),
    (PositiveFraction, 0.0, "must lie in (0, 1]"),
    (FractionBelowOne, 1.0, "must lie in [0, 1)"),
    (Positive | None, 0.0, "must be positive, or null"),
    (Annotated[int, Le(7)], 8, "must be at most 7"),
    (tuple[FractionBelowOne, ...], [0.1, 1.0], "must lie in [0, 1)"),
    (float, float("inf"), "must be a finite number"),
    (int, True, "must be an integer"),
    (int, 1.0, "must be an integer"),
    (float, "1", "must be a number"),
    (str, 1, "must be a text"),
    (bool, 1, "must be true or false"),
    (str | None, 1, "must be null or a text"),
    (Literal["a", "b"], "c", "must be one of 'a', 'b'"),
    (tuple[float, float], [1.0], "must be a list of 2, each a number"),
    (tuple[int, ...], 3, "must be a list such as [a, b], each an integer"),
]


@pytest.mark.parametrize(("kind", "value", "rule"), LIMITS, ids=[f"{row[2]}-{n}" for n, row in enumerate(LIMITS)])
def test_a_value_that_a_field_does_not_take_is_told(kind, value, rule):
    with pytest.raises(ConfigError) as caught:
        check_value("a.b", kind, value)
    assert (caught.value.field, caught.value.value, caught.value.rule) == ("a.b", value, rule)


@pytest.mark.parametrize(
    ("kind", "value"),
    [(Count, 1), (Positive, 1), (Fraction, 0), (tuple[int, ...] | None, [1, 2]), (str | None, None), (bool, False)],
)
def test_a_value_within_the_limits_passes(kind, value):
    check_value("a", kind, value)


def test_a_section_names_the_field_at_fault_by_its_path():
    with pytest.raises(ConfigError, match=r"^part\.width: 0 must be at least 1$"):
        Part(width=0)


def test_a_section_takes_lists_for_tuples():
    assert Part(rates=[0.1, 0.2]).rates == (0.1, 0.2)


def test_a_section_refuses_an_unknown_field():
    with pytest.raises(ConfigError, match=r"part\.height: 3 is not a field"):
        Part(height=3)


def test_plain_values_and_back():
    config = Whole(seed=7, part=Part(width=2, rates=(0.25,)))
    assert to_dict(config) == {"seed": 7, "note": "", "part": {"width": 2, "rates": [0.25]}}
    assert from_dict(to_dict(config), Whole) == config


@pytest.mark.parametrize(("values", "field"), [({"part": {"hight": 1}}, "part.hight"), ({"sed": 1}, "sed")])
def test_stored_values_with_an_unknown_field_are_refused(values, field):
    with pytest.raises(ConfigError) as caught:
        from_dict(values, Whole)
    assert caught.value.field == field


def test_neutral_fields_are_no_part_of_the_result():
    assert result_values(Whole()) == {"seed": 1, "part": {"width": 4, "rates": [0.5]}}


def test_field_types_name_sections_and_leaves():
    assert list(field_types(Whole)) == ["seed", "note", "part", "part.width", "part.rates"]


def test_expected_says_a_section():
    assert expected(Part) == "a section with fields of its own"
