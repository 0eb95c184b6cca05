"""Sections of a configuration: frozen dataclasses whose limits stand at the field.

A section is declared once. Its defaults, its limits and the docstrings under its fields are what the
command line, ``--help``, the stored configuration and the messages for people are made of; pydantic checks
the values. A value that breaks a limit is a :class:`~accel_train.errors.ConfigError` that names the field.
"""

from __future__ import annotations

import functools
import importlib
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import field, fields, is_dataclass
from typing import Annotated, Any, Literal, TypeVar, dataclass_transform

from annotated_types import Ge, Gt, Le, Lt
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from accel_train.errors import ConfigError

T = TypeVar("T")

Count = Annotated[int, Ge(1)]
"""1, 2, 3, ..."""
CountOrZero = Annotated[int, Ge(0)]
"""0, 1, 2, ..."""
Positive = Annotated[float, Gt(0)]
"""A number above 0."""
NotNegative = Annotated[float, Ge(0)]
"""A number from 0 on."""
Fraction = Annotated[float, Ge(0), Le(1)]
"""A number in [0, 1]."""
PositiveFraction = Annotated[float, Gt(0), Le(1)]
"""A number in (0, 1]."""
FractionBelowOne = Annotated[float, Ge(0), Lt(1)]
"""A number in [0, 1)."""

# A parameter of another type is no section's business: nothing is converted, nothing is left over.
_STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

_LIMITS_BROKEN = {"greater_than", "greater_than_equal", "less_than", "less_than_equal"}
_PLAIN_TYPES = {int: "an integer", float: "a number", str: "a text", bool: "true or false", type(None): "null"}


def neutral(*, default: Any) -> Any:
    """Return a field that cannot change the result of a run: it stays out of the configuration's hash."""
    return field(metadata={"result": False}, default=default)


@dataclass_transform(frozen_default=True, field_specifiers=(field, neutral))
def section(path: str) -> Callable[[type[T]], type[T]]:
    """Make a class a section: a frozen dataclass whose values are checked when it is built.

        @section("training")
        class TrainingConfig:
            max_epochs: Count = 50
            \"\"\"Epochs at most.\"\"\"

    Args:
        path: dotted name of the section, for messages; empty for the whole configuration.

    Returns:
        The decorator. The class it returns raises :class:`ConfigError` for a value of a wrong type, one that
        breaks a limit, and an unknown field; ``__post_init__`` may check fields against each other.
    """

    def decorate(cls: type[T]) -> type[T]:
        checked = dataclass(cls, frozen=True, config=_STRICT)
        plain_init = checked.__init__
        prefix = f"{path}." if path else ""

        @functools.wraps(plain_init)
        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            try:
                plain_init(self, *_as_tuples([*args]), **{name: _as_tuples(value) for name, value in kwargs.items()})
            except ValidationError as error:
                raise _explained(error, prefix, typing.get_type_hints(checked, include_extras=True)) from None

        checked.__init__ = init  # type: ignore[method-assign]
        return typing.cast(type[T], checked)

    return decorate


def check(ok: bool, name: str, value: object, rule: str) -> None:
    """Raise :class:`ConfigError` unless ``ok``: for what no limit at one field can say."""
    if not ok:
        raise ConfigError(name, value, rule)


def check_value(name: str, kind: Any, value: object) -> None:
    """Refuse a value that a field of this type does not take.

    Args:
        name: dotted name of the field.
        kind: its type with its limits.
        value: lists stand for tuples.

    Raises:
        ConfigError: names the field, the value and what the field takes.
    """
    try:
        _adapter(kind).validate_python(_as_tuples(value))
    except ValidationError as error:
        raise ConfigError(name, value, _broken_rule([each["type"] for each in error.errors()], kind)) from None


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind, config=_STRICT)


def _explained(error: ValidationError, prefix: str, kinds: Mapping[str, Any]) -> ConfigError:
    first = error.errors()[0]
    if isinstance(cause := first.get("ctx", {}).get("error"), ConfigError):
        return cause
    name = str(first["loc"][0]) if first["loc"] else ""
    rule = _broken_rule([first["type"]], kinds[name]) if name in kinds else "is not a field of this section"
    return ConfigError(f"{prefix}{name}", first["input"], rule)


def _broken_rule(problems: Sequence[str], kind: Any) -> str:
    """What a value must be, in words; ``problems`` are pydantic's names of what it is not."""
    if "finite_number" in problems:
        return "must be a finite number"
    if {*problems} <= _LIMITS_BROKEN:
        or_null = ", or null" if type(None) in typing.get_args(kind) else ""
        return f"must {_limits(kind)}{or_null}"
    return f"must be {expected(kind)}"


def _limits(kind: Any) -> str:
    """The limits of a type in words, such as "lie in [0, 1)"."""
    found = dict(_bounds(kind))
    low = found.get(Ge, found.get(Gt))
    high = found.get(Le, found.get(Lt))
    if low is not None and high is not None:
        return f"lie in {'[' if Ge in found else '('}{low:g}, {high:g}{']' if Le in found else ')'}"
    if low is None:
        return f"be {'at most' if Le in found else 'less than'} {high}"
    if low == 0:
        return "not be negative" if Ge in found else "be positive"
    return f"be {'at least' if Ge in found else 'more than'} {low}"


def _bounds(kind: Any) -> Iterator[tuple[type, float]]:
    for limit in getattr(kind, "__metadata__", ()):
        yield type(limit), getattr(limit, type(limit).__name__.lower())
    for part in typing.get_args(kind):
        yield from _bounds(part)


def expected(kind: Any) -> str:
    """A type in words, such as "a list of integers or null"."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return expected(parts[0])
    if is_dataclass(kind):
        return "a section with fields of its own"
    if origin is Literal:
        return f"one of {', '.join(map(repr, parts))}"
    if origin in {typing.Union, types.UnionType}:
        null_first = sorted(parts, key=lambda part: part is not type(None))
        return " or ".join(expected(part) for part in null_first)
    if origin is tuple:
        shape = "such as [a, b]" if parts[-1] is Ellipsis else f"of {len(parts)}"
        return f"a list {shape}, each {expected(parts[0])}"
    return _PLAIN_TYPES.get(kind, str(kind))


def field_types(cls: type, prefix: str = "") -> dict[str, Any]:
    """Dotted name -> type, with limits, of every section and field of a configuration class."""
    kinds, found = typing.get_type_hints(cls, include_extras=True), {}
    for name in (f.name for f in fields(cls)):
        found[f"{prefix}{name}"] = kinds[name]
        if is_dataclass(kinds[name]):
            found |= field_types(kinds[name], f"{prefix}{name}.")
    return found


def to_dict(config: Any) -> dict[str, Any]:
    """Return the configuration as plain JSON values; tuples become lists."""
    return {f.name: _plain(getattr(config, f.name), to_dict) for f in fields(config)}


def from_dict(values: Mapping[str, Any], cls: type[T]) -> T:
    """Build a configuration from nested plain values: the inverse of :func:`to_dict`.

    Raises:
        ConfigError: an unknown field, a value of a wrong type, or one that breaks a rule.
    """
    kinds = typing.get_type_hints(cls)
    sections = {name for name, value in values.items() if is_dataclass(kinds.get(name)) and isinstance(value, Mapping)}
    return cls(**{**values, **{name: from_dict(values[name], kinds[name]) for name in sections}})


def result_values(config: Any) -> dict[str, Any]:
    """Return the fields that change the result, as nested JSON values."""
    named = (f.name for f in fields(config) if f.metadata.get("result", True))
    return {name: _plain(getattr(config, name), result_values) for name in named}


def _plain(value: Any, of_section: Callable[[Any], dict[str, Any]]) -> Any:
    if is_dataclass(value):
        return of_section(value)
    return [_plain(item, of_section) for item in value] if isinstance(value, tuple) else value


def _as_tuples(value: Any) -> Any:
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value


def import_by_path(field: str, path: str) -> Any:
    """Return what ``package.module:name`` names.

    Args:
        field: that holds the path, for messages.
        path: import path of the module, a colon, a name in it.

    Raises:
        ConfigError: the module cannot be imported, or has no such name.
        Exception: whatever else the module raises while it is imported.
    """
    module, _, name = path.partition(":")
    if not module or module.startswith("."):
        raise ConfigError(field, path, "names no module; write package.module:name")
    try:
        imported = importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(field, path, f"cannot be imported: {error}; is it installed or on PYTHONPATH?") from error
    if not hasattr(imported, name):
        raise ConfigError(field, path, f"names nothing: {module} has no {name!r}")
    return getattr(imported, name)
