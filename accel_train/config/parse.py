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
from contextlib import suppress
from dataclasses import is_dataclass
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


def parse_config(argv: Sequence[str], class_of: ClassOf) -> tuple[ExperimentConfig, EarlierRun]:
    """Return what options ask for: the configuration, and what becomes of an earlier run.

    Args:
        argv: ``--config FILE``, ``--section.field VALUE``, ``--fresh``, ``--on_damage ANSWER``, ``--print_config``.
        class_of: the configuration class of a task.

    Raises:
        ConfigError: names the field (and the file, where the value stands in one), the value and the rule.
        SystemExit: ``--help`` or ``--print_config`` was answered.
    """
    origin: dict[str, str] = {}
    try:
        return _configured(argv, class_of, origin)
    except ConfigError as error:
        if error.field not in origin:
            raise
        raise ConfigError(error.field, error.value, f"{error.rule} (in {origin[error.field]})") from None


def _configured(argv: Sequence[str], class_of: ClassOf, origin: dict[str, str]) -> tuple[ExperimentConfig, EarlierRun]:
    """As :func:`parse_config`; ``origin`` learns in which file each field is set that no option sets."""
    # The task comes first: it says which fields there are.
    first = _Parser(add_help=False)
    first.add_argument("--config", action="append", default=[])
    first.add_argument("--task")
    begun, _ = _parse(first, argv)
    files = {name: load_yaml(name) for name in begun.config}
    task = ExperimentConfig.task
    for file, content in files.items():
        if "task" in content:
            task, origin["task"] = content["task"], file
    if "task" in begun:
        task = begun.task
        origin.clear()
    check_value("task", str, task)
    cls = class_of(task)
    kinds = field_types(cls)
    values: dict[str, Any] = {}  # nested; later files win over earlier ones, options over files
    for file, content in files.items():
        for name, value in _leaves(content, kinds):
            origin[name] = file
            if name not in kinds or is_dataclass(kinds[name]):
                raise _no_value(name, value, kinds)
            check_value(name, kinds[name], value)
            _put(values, name, value)
    parsed, extra = _parse(option_parser(cls), argv)
    if extra:
        raise _leftover(extra, kinds)
    options = vars(parsed)
    options.pop("config", None)
    asked_to_print = options.pop("print_config", False)
    earlier = EarlierRun(**{name: options.pop(name) for name in ("fresh", "on_damage") if name in options})
    check_value("--on_damage", typing.get_type_hints(EarlierRun)["on_damage"], earlier.on_damage)
    for name, text in options.items():
        origin.pop(name, None)
        _put(values, name, _option_value(name, text, kinds[name]))
    config = from_dict(values, cls)
    if asked_to_print:
        print(yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True), end="")
        raise SystemExit(0)
    return config, earlier


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


def _leaves(content: Mapping[Any, Any], kinds: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted names and values: those of the fields in every section."""
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and is_dataclass(kinds.get(name)):
            yield from _leaves(value, kinds, f"{name}.")
        else:
            yield name, value


def _put(values: dict[str, Any], name: str, value: Any) -> None:
    """Set the field with a dotted name in nested dictionaries."""
    *sections, leaf = name.split(".")
    for section in sections:
        values = values.setdefault(section, {})
    values[leaf] = value


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
    usage = "%(prog)s [--config FILE] [--SECTION.FIELD VALUE ...] [--fresh] [--on_damage restart] [--print_config]"
    about = "Train, or resume: the same command run again continues. Options win over the file."
    parser = _Parser(prog="accel-train train", usage=usage, description=about)
    parser.add_argument("--config", metavar="FILE", action="append", help="YAML file with any fields below")
    parser.add_argument("--fresh", action="store_true", help="archive an earlier run of this name and start over")
    on_damage = "when every checkpoint is damaged: refuse to go on (the default), or set them aside and start over"
    parser.add_argument("--on_damage", metavar="refuse|restart", help=on_damage)
    parser.add_argument("--print_config", action="store_true", help="print the whole configuration as YAML and exit")
    # Each section has a heading of its own.
    groups = {"": (parser.add_argument_group("experiment"), cls)}
    for name, kind in field_types(cls).items():
        if is_dataclass(kind):
            about = (kind.__doc__ or "").partition("\n")[0]
            groups[name] = (parser.add_argument_group(name, about), typing.cast(type, kind))
        else:
            section, _, leaf = name.rpartition(".")
            group, owner = groups[section]
            group.add_argument(f"--{name}", metavar=_metavar(kind), help=_help(owner, leaf).replace("%", "%%"))
    return parser


def _help(cls: Any, name: str) -> str:
    """The docstring under a field, which pydantic keeps with the class that declares it, and the default."""
    described = (vars(base)["__pydantic_fields__"] for base in cls.__mro__ if "__pydantic_fields__" in vars(base))
    texts = [found[name].description for found in described if name in found]
    default = yaml.safe_dump(to_dict(cls())[name], default_flow_style=True).removesuffix("\n...\n").strip()
    return f"{' '.join((next(filter(None, texts), '')).split())} (default: {default})"


def _metavar(kind: Any) -> str:
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return "|".join(map(str, parts))
    if origin is tuple:
        return "LIST"
    if parts:
        return next(_metavar(part) for part in parts if part is not type(None))
    return _METAVARS.get(kind, "VALUE")


def _option_value(name: str, text: str, kind: Any) -> Any:
    value = text
    # A text stands for itself, but null where that is allowed.
    if kind is not str and (kind != str | None or text == "null"):
        with suppress(yaml.YAMLError):
            value = yaml.load(text, _Loader)
    try:
        check_value(name, kind, value)
    except ConfigError as error:
        # What breaks a limit is shown as it was understood, what has the wrong type as it was written.
        raise ConfigError(name, text, error.rule) if error.rule == f"must be {expected(kind)}" else error from None
    return value


def _leftover(extra: Sequence[str], kinds: Mapping[str, Any]) -> ConfigError:
    option = extra[0]
    if not option.startswith("--"):
        return ConfigError("command line", option, "is not an option; write --section.field VALUE")
    name, _, value = option[2:].partition("=")
    return _no_value(name, value or " ".join(extra[1:2]), kinds)


def _no_value(name: str, value: object, kinds: Mapping[str, Any]) -> ConfigError:
    """What is wrong with a value that was given to no field: its name is a section's, or nobody's."""
    if name in kinds:
        return ConfigError(name, value, f"must be {expected(kinds[name])}")
    section, _, leaf = name.rpartition(".")
    near = [known for known in kinds if known == _MOVED.get(name) or known.endswith(f".{name}")]
    if not near and is_dataclass(kinds.get(section)):
        leaves = [known.rpartition(".")[2] for known in kinds if known.startswith(f"{section}.")]
        near = [f"{section}.{match}" for match in difflib.get_close_matches(leaf, leaves, n=1)]
    elif not near:
        near = difflib.get_close_matches(name, kinds, n=1, cutoff=0.7)
    cure = f"did you mean {near[0]}?" if near else "accel-train train --help lists them"
    return ConfigError(name, value, f"is not a field of the configuration; {cure}")
