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
    """
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise ConfigError(field, path, f"cannot be imported: {error}; is it installed or on PYTHONPATH?") from error
    except AttributeError as error:
        raise ConfigError(field, path, f"names nothing: {module} has no {name!r}") from error
