"""Services that the command line passes to a trainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from accel_train.process.work import pass_by
from accel_train.ranks.coordinator import Coordinator


@dataclass(frozen=True)
class Services:
    """What a run of the command line adds to its trainer; a trainer used as a library needs none of it."""

    coordinator: Coordinator | None = None
    """Agreement between the ranks, whose stop flag somebody sets; None: the trainer makes one and handles signals."""
    config_hash: str | None = None
    """Identifies the experiment in checkpoints; None: the hash of the loop's configuration, seed and samples."""
    extra_files: Mapping[str, bytes] = field(default_factory=dict)
    """Small files stored in every checkpoint, by name."""
    data_digests: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 of what the data is made of, by name; a checkpoint of other data is refused."""
    logs: Sequence[Path] = ()
    """Files that must be on disk before a checkpoint counts, such as a log of metrics."""
    restart: bool = False
    """Start over when every checkpoint is damaged, instead of refusing."""
    reached: Callable[[str], None] = pass_by
    """Called with every fault point (see :mod:`accel_train.process.fault_points`)."""
