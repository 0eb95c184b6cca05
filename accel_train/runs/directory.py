"""The run directory: its lock, its configuration, its archive, its logs.

    <output_dir>/<name or experiment id>/
        config.yaml result.json metrics.jsonl checkpoints/ figures/ samples/ logs/rank_N.log

Only the main process opens and closes it; it holds the lock from the first write to the last.
"""

from __future__ import annotations

import logging
import os
import secrets
import sys
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import yaml

from accel_train.config.fields import from_dict, result_values, to_dict
from accel_train.config.identity import config_hash, differing_fields, experiment_id
from accel_train.config.parse import load_yaml
from accel_train.config.sections import SHARED_CORPORA, ExperimentConfig
from accel_train.errors import ConfigError
from accel_train.files.atomic import write_atomic
from accel_train.process.work import SILENT, Say, WorkContext
from accel_train.runs.lock import LOCK_FILE, RunLock
from accel_train.runs.record import RECORD_FILE, RunRecord, read_record
from accel_train.tasks.registry import config_class

log = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"
_TOKEN, _TOKEN_SECONDS = ".seen-by-all-", 30.0
_NOT_ARCHIVED = (LOCK_FILE, _TOKEN)
"""How the names begin of what belongs to a launch in progress and not to a run."""


class RunDirectory:
    """The directory of one experiment.

    Args:
        config: the experiment's configuration.
        init_digest: digest of the weights that ``start.weights`` names.
    """

    def __init__(self, config: ExperimentConfig, init_digest: str | None = None) -> None:
        self.config, self.init_digest = config, init_digest
        self.config_hash = config_hash(config, init_digest)
        self.path = run_directory(config, init_digest)
        self._lock: RunLock | None = None

    def open(self, work: WorkContext, *, fresh: bool) -> RunRecord | None:
        """Lock the directory, archive it if asked, and return the record found there.

        Raises:
            RunLocked: another live process holds it.
            ConfigError: it belongs to another configuration, or cannot be made.
            Interrupted: ``work`` was told to stop while waiting for the lock.
        """
        self._make()
        self._lock = RunLock(self.path, self.config.start.lock_timeout, work, on_lost=_leave_at_once)
        self._lock.acquire()
        if fresh:
            self._archive(work.say)
        self._refuse_other_configuration()
        record = read_record(self.path) if (self.path / RECORD_FILE).exists() else None
        if record is None or record.status != "completed":
            write_atomic(self.path / CONFIG_FILE, dump_config(self.config).encode())
        return record

    def leave_token(self) -> str:
        """Write a file that every other process should see; returns its name. Needs no lock.

        Raises:
            ConfigError: the directory cannot be made.
        """
        self._make()
        token = f"{_TOKEN}{secrets.token_hex(8)}"
        (self.path / token).touch()
        return token

    def sees_token(self, token: str, patience: float) -> bool:
        """Whether the file is seen here within ``patience`` seconds (half a minute at most).

        A network file system may show a new file to another machine only seconds later.
        """

        def is_seen() -> bool:
            # Listed, not looked up: some clients remember for long that a name did not exist.
            return self.path.is_dir() and self.path / token in self.path.iterdir()

        seconds = min(patience, _TOKEN_SECONDS)
        return SILENT.wait_for("directory", is_seen, seconds, lambda: f"waiting for {self.path / token}")

    def remove_token(self, token: str, *, refused: bool) -> None:
        """Take the file away; and when the directory is refused, that too if it holds nothing else.

        Not otherwise: another launch of the same run may just be about to use it.
        """
        (self.path / token).unlink(missing_ok=True)
        if refused:
            with suppress(OSError):
                self.path.rmdir()

    def close(self) -> None:
        """Release the lock; safe to call twice, and without :meth:`open`."""
        if self._lock is not None:
            self._lock.release()

    def _make(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            # What no check beforehand can know: quotas, remote and virtual file systems.
            where = f"cannot be written ({self.path}: {error.strerror}); choose another directory or name"
            raise ConfigError("output_dir", self.config.output_dir, where) from error

    def _refuse_other_configuration(self) -> None:
        path = self.path / CONFIG_FILE
        if not path.exists():
            return
        lines = differing_fields(result_values(self.config), result_values(read_config(path)))
        if not lines and (self.path / RECORD_FILE).exists():
            known = read_record(self.path).config_hash
            if known != self.config_hash:
                lines = [f"config_hash: {self.config_hash[:8]} here, {known[:8]} there (start.weights)"]
        if lines:
            cure = "choose another name, or --fresh to archive it and start over"
            rule = f"is a run of another configuration ({'; '.join(lines)}); {cure}"
            raise ConfigError("name", self.path.name, rule)

    def _archive(self, say: Say) -> None:
        present = [path.name for path in self.path.iterdir() if not path.name.startswith(_NOT_ARCHIVED)]
        if not present:
            return
        wanted = f"{self.path.name}.archived-{datetime.now(UTC):%Y%m%dT%H%M%S}"
        archive, number = self.path.with_name(wanted), 1
        while archive.exists():
            number += 1
            archive = self.path.with_name(f"{wanted}-{number}")
        archive.mkdir()
        # The record goes first: a kill in the middle of archiving must not leave a directory that looks finished.
        for name in sorted(present, key=lambda name: name != RECORD_FILE):
            (self.path / name).rename(archive / name)
        say("archive", f"the earlier run was moved to {archive}")


def _leave_at_once(message: str) -> None:
    """Two processes must not write one run: whoever lost the lock leaves without saving."""
    log.critical("%s; leaving without saving", message)
    sys.stderr.flush()
    os._exit(1)


def dump_config(config: ExperimentConfig) -> str:
    """The configuration as YAML."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def read_config(path: Path) -> ExperimentConfig:
    """Return the configuration that a run stored.

    Raises:
        ConfigError: the file cannot be read, is no configuration, or is one of another version; or there is no
            such task here.
    """
    try:
        values = load_yaml(str(path))
        return from_dict(values, config_class(str(values.get("task", ExperimentConfig.task))))
    except ConfigError as error:
        if error.field == "task":
            raise
        other = f"was not written by this version of accel_train ({error}); use the one that wrote it, or train anew"
        raise ConfigError(str(path), CONFIG_FILE, error.rule if error.field == "--config" else other) from error


def run_directory(config: ExperimentConfig, init_digest: str | None = None) -> Path:
    """Return where the run lives: ``output_dir / (name or experiment id)``."""
    return Path(config.output_dir) / (config.name or experiment_id(config, init_digest))


def check_output_dir(config: ExperimentConfig) -> None:
    """Raise :class:`ConfigError` unless the output directory can be written; creates nothing."""
    path = Path(config.output_dir).absolute()
    existing = next(place for place in (path, *path.parents) if place.exists())
    shared = path / SHARED_CORPORA
    if not existing.is_dir():
        rule = f"is not a directory: {existing} is a file"
    elif shared.exists() and not shared.is_dir():
        rule = f"holds a file named {SHARED_CORPORA}; move it or choose another"
    elif not os.access(existing, os.W_OK | os.X_OK) or os.statvfs(existing).f_flag & os.ST_RDONLY:
        rule = f"is not writable ({existing}); choose another"
    else:
        return
    raise ConfigError("output_dir", config.output_dir, rule)
