"""Things of the user's, by import path."""

from __future__ import annotations

import importlib
from typing import Any

from accel_train.errors import ConfigError


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
