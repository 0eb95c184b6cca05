"""What makes two runs the same: the hash of a configuration, and the name of its run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accel_train.config.fields import result_values
from accel_train.config.sections import ExperimentConfig
from accel_train.files.atomic import sha256_json


def config_hash(config: ExperimentConfig, init_digest: str | None = None) -> str:
    """Return the SHA-256 (hex) of every field that changes the result.

    Args:
        config: the configuration.
        init_digest: digest of the weights that ``start.weights`` names, if it is set.
    """
    start = {} if init_digest is None else {"init_digest": init_digest}
    return sha256_json({**result_values(config), **start})


def experiment_id(config: ExperimentConfig, init_digest: str | None = None) -> str:
    """Return a readable name such as ``walks_n500_w64_d128_L4_s42-1f2e3d4c``."""
    model = config.model
    parts = [config.section_name, getattr(config.section, "slug", ""), f"w{model.max_seq_len}", f"d{model.d_model}"]
    name = "_".join(filter(None, [*parts, f"L{model.n_layers}", f"s{config.seed}"]))
    return f"{name}-{config_hash(config, init_digest)[:8]}"


def differing_fields(ours: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return lines such as ``training.learning_rate: 0.001 here, 0.0003 there`` for two nested dictionaries."""
    lines: list[str] = []
    for name in sorted({*ours, *theirs}):
        a, b = ours.get(name), theirs.get(name)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += differing_fields(a, b, f"{prefix}{name}.")
        elif a != b:
            lines.append(f"{prefix}{name}: {a!r} here, {b!r} there")
    return lines
