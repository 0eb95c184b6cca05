"""Options and YAML files, turned into a configuration.

Names, types, limits and help of the options come from the sections. Every value is checked where it stands
first, so that a message names the option or the file at fault; then the sections check their fields against
each other. Later files win over earlier ones, options over files.
"""

from __future__ import annotations

import argparse
import difflib
import re
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from accel_train.config.fields import check_value, expected, field_types, from_dict, to_dict
from accel_train.config.sections import EarlierRun, ExperimentConfig
from accel_train.errors import ConfigError

ClassOf = Callable[[str], type[ExperimentConfig]]
"""``class_of(task)``: the configuration class with the section of a task."""

_MOVED = {"training.init_from": "start.weights", "training.lock_timeout": "start.lock_timeout"}
"""Fields of earlier versions whose name says nothing of where they are now."""
_METAVARS = {int: "N", float: "X", str: "TEXT", bool: "true|false"}


@dataclass(frozen=True)
class _Given:
    """A value as somebody gave it."""

    value: Any
    raw: Any
    """As it was written, for messages."""
    file: str | None
    """Where it stands; None: on the command line."""

    def at_fault(self, error: ConfigError) -> ConfigError:
        where = f" (in {self.file})" if self.file else ""
        return ConfigError(error.field, error.value, f"{error.rule}{where}")


def parse_config(argv: Sequence[str], class_of: ClassOf) -> tuple[ExperimentConfig, EarlierRun]:
    """Return what options ask for: the configuration, and what becomes of an earlier run.

    Args:
        argv: ``--config FILE``, ``--section.field VALUE``, ``--fresh``, ``--on_damage ANSWER``, ``--print_config``.
        class_of: the configuration class of a task.

    Raises:
        ConfigError: names the field (and the file, where the value stands in one), the value and the rule.
        SystemExit: ``--help`` or ``--print_config`` was answered.
    """
    first = _Parser(add_help=False)
    first.add_argument("--config", action="append", default=[])
    first.add_argument("--task")
    begun, _ = _parse(first, argv)
    files = {name: load_yaml(name) for name in begun.config}
    cls = _class_for(getattr(begun, "task", None), files, class_of)
    kinds = field_types(cls)
    given: dict[str, _Given] = {}
    for name, values in files.items():
        given |= dict(_from_file(name, values, kinds))
    parsed, extra = _parse(option_parser(cls), argv)
    if extra:
        raise _leftover(extra, kinds)
    options = {name: value for name, value in vars(parsed).items() if name != "config"}
    asked_to_print = options.pop("print_config", False)
    earlier = _earlier_run(options)
    given |= {name: _from_option(name, text, kinds) for name, text in options.items()}
    try:
        config = from_dict(_nested(given), cls)
    except ConfigError as error:
        raise given[error.field].at_fault(error) if error.field in given else error from None
    if asked_to_print:
        print(yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True), end="")
        raise SystemExit(0)
    return config, earlier


def _class_for(option: str | None, files: Mapping[str, Mapping[str, Any]], class_of: ClassOf) -> type[ExperimentConfig]:
    task = _Given(ExperimentConfig.task, ExperimentConfig.task, None)
    for name, values in files.items():
        if "task" in values:
            task = _Given(values["task"], values["task"], name)
    if option is not None:
        task = _Given(option, option, None)
    try:
        check_value("task", str, task.value)
        return class_of(task.value)
    except ConfigError as error:
        raise task.at_fault(error) from None


# -- files -------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, with numbers such as ``1e-3``, which PyYAML takes for text."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+$"), list("-+0123456789"))


def load_yaml(name: str) -> dict[str, Any]:
    """Return the fields in a YAML file.

    Raises:
        ConfigError: the file cannot be read or holds no fields; names line and column.
    """
    try:
        values = yaml.load(Path(name).read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise ConfigError("--config", name, "does not exist; check the path") from None
    except OSError as error:
        raise ConfigError("--config", name, f"cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError("--config", name, f"is not UTF-8 text (byte {error.start}); check the path") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error)
        raise ConfigError("--config", name, f"is not valid YAML: {line}{problem}") from None
    if not isinstance(values, dict):
        raise ConfigError("--config", name, "holds no fields; write lines such as 'seed: 1'")
    return values


def _from_file(
    file: str, values: Mapping[Any, Any], kinds: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, _Given]]:
    """Yield the checked leaves of a file by dotted name."""
    for key, value in values.items():
        name, given = f"{prefix}{key}", _Given(value, value, file)
        try:
            if name not in kinds:
                raise _unknown(name, value, kinds)
            if is_dataclass(kinds[name]):
                if not isinstance(value, Mapping):
                    raise ConfigError(name, value, f"must be {expected(kinds[name])}")
                yield from _from_file(file, value, kinds, f"{name}.")
                continue
            check_value(name, kinds[name], value)
        except ConfigError as error:
            raise error if error.field != name else given.at_fault(error) from None
        yield name, given


def _nested(given: Mapping[str, _Given]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, each in given.items():
        *sections, leaf = name.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[leaf] = each.value
    return tree


# -- options -----------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Keeps what was given only, and raises what argparse would print."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, exit_on_error=False, argument_default=argparse.SUPPRESS, **kwargs)


def _parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    try:
        return parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        needs = "takes no value" if error.argument_name in {"--fresh", "--print_config"} else "needs a value"
        raise ConfigError("command line", error.argument_name, needs) from None


def option_parser(cls: type[ExperimentConfig]) -> argparse.ArgumentParser:
    """Return the parser of the options of ``accel-train train`` for one task."""
    parser = _Parser(
        prog="accel-train train",
        usage="accel-train train [--config FILE] [--SECTION.FIELD VALUE ...] [--fresh] [--on_damage restart] "
        "[--print_config]",
        description="Train, or resume: the same command run again continues. Options win over the file.",
    )
    parser.add_argument("--config", metavar="FILE", action="append", help="YAML file with any fields below")
    parser.add_argument("--fresh", action="store_true", help="archive an earlier run of this name and start over")
    parser.add_argument(
        "--on_damage",
        metavar="refuse|restart",
        help="when every checkpoint is damaged: refuse to go on (the default), or set them aside and start over",
    )
    parser.add_argument("--print_config", action="store_true", help="print the whole configuration as YAML and exit")
    _add_fields(parser, parser.add_argument_group("experiment"), cls)
    return parser


def _add_fields(parser: argparse.ArgumentParser, group: Any, cls: Any, prefix: str = "") -> None:
    """Add the options of one section, then those of the sections in it, each under a heading of its own."""
    kinds = typing.get_type_hints(cls, include_extras=True)
    leaves = [f for f in fields(cls) if not is_dataclass(kinds[f.name])]
    for f in leaves:
        group.add_argument(
            f"--{prefix}{f.name}",
            metavar=_metavar(kinds[f.name]),
            help=_help(cls, f.name).replace("%", "%%"),
        )
    for f in fields(cls):
        if f not in leaves:
            name = f"{prefix}{f.name}"
            about = (kinds[f.name].__doc__ or "").partition("\n")[0]
            _add_fields(parser, parser.add_argument_group(name, about), kinds[f.name], f"{name}.")


def _help(cls: Any, name: str) -> str:
    """The docstring under a field, which pydantic keeps with the class that declares it, and the default."""
    described = (vars(base)["__pydantic_fields__"] for base in cls.__mro__ if "__pydantic_fields__" in vars(base))
    texts = [found[name].description for found in described if name in found]
    default = yaml.safe_dump(to_dict(cls())[name], default_flow_style=True).removesuffix("\n...\n").strip()
    return f"{' '.join((next(filter(None, texts), '')).split())} (default: {default})"


def _metavar(kind: Any) -> str:
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return _metavar(parts[0])
    if origin is Literal:
        return "|".join(map(str, parts))
    if origin is tuple:
        return "LIST"
    if parts:
        return next(_metavar(part) for part in parts if part is not type(None))
    return _METAVARS.get(kind, "VALUE")


def _from_option(name: str, text: Any, kinds: Mapping[str, Any]) -> _Given:
    kind = kinds[name]
    value = text
    # A text stands for itself, but null where that is allowed.
    if kind is not str and (kind != str | None or text == "null"):
        try:
            value = yaml.load(text, _Loader)
        except yaml.YAMLError:
            value = text
    try:
        check_value(name, kind, value)
    except ConfigError as error:
        # What breaks a limit is shown as it was understood, what has the wrong type as it was written.
        raise ConfigError(name, text, error.rule) if error.rule == f"must be {expected(kind)}" else error from None
    return _Given(value, text, None)


def _earlier_run(options: dict[str, Any]) -> EarlierRun:
    chosen = {name: options.pop(name) for name in ("fresh", "on_damage") if name in options}
    for name, value in chosen.items():
        check_value(f"--{name}", typing.get_type_hints(EarlierRun)[name], value)
    return EarlierRun(**chosen)


def _leftover(extra: Sequence[str], kinds: Mapping[str, Any]) -> ConfigError:
    option = extra[0]
    if not option.startswith("--"):
        return ConfigError("command line", option, "is not an option; write --section.field VALUE")
    name, _, value = option[2:].partition("=")
    if is_dataclass(kinds.get(name)):
        return ConfigError(name, value or next(iter(extra[1:]), None), f"must be {expected(kinds[name])}")
    return _unknown(name, value or " ".join(extra[1:2]), kinds)


def _unknown(name: str, value: object, kinds: Mapping[str, Any]) -> ConfigError:
    section, _, leaf = name.rpartition(".")
    moved = [known for known in kinds if known == _MOVED.get(name) or known.endswith(f".{name}")]
    if moved:
        near = moved
    elif is_dataclass(kinds.get(section)):
        leaves = [known.rpartition(".")[2] for known in kinds if known.startswith(f"{section}.")]
        near = [f"{section}.{match}" for match in difflib.get_close_matches(leaf, leaves, n=1)]
    else:
        near = difflib.get_close_matches(name, kinds, n=1, cutoff=0.7)
    cure = f"did you mean {near[0]}?" if near else "accel-train train --help lists them"
    return ConfigError(name, value, f"is not a field of the configuration; {cure}")
