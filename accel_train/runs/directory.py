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
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from accel_train.config.sections import (
    ExperimentConfig,
    config_hash,
    differing_fields,
    experiment_id,
    from_dict,
    hashed_fields,
    run_directory,
    to_dict,
)
from accel_train.errors import ConfigError
from accel_train.files.atomic import write_atomic
from accel_train.runs.lock import RunLock
from accel_train.runs.record import read_record
from accel_train.training.progress import ConsoleHandler

log = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"
_TOKEN, _TOKEN_SECONDS = ".seen-by-all-", 30.0
# The record goes first: a kill in the middle of archiving must not leave a directory that looks finished.
_ARCHIVED = ("result.json", "checkpoints", "metrics.jsonl", CONFIG_FILE, "figures", "samples", "logs", "tracking")


class RunDirectory:
    """The directory of one experiment.

    Args:
        config: the experiment's configuration.
        init_digest: digest of the weights that ``training.init_from`` names.
    """

    def __init__(self, config: ExperimentConfig, init_digest: str | None = None) -> None:
        self.config = config
        self.init_digest = init_digest
        self.config_hash = config_hash(config, init_digest)
        self.experiment_id = experiment_id(config, init_digest)
        self.path = run_directory(config, init_digest)
        self._lock: RunLock | None = None

    def open(self, *, fresh: bool, should_stop: Callable[[], bool], say: Callable[[str, str], None]) -> dict[str, Any]:
        """Lock the directory, archive it if asked, and return the record found there (empty if none).

        Raises:
            RunLocked: another live process holds it.
            ConfigError: it belongs to another configuration, or cannot be made.
            Interrupted: ``should_stop()`` turned true while waiting for the lock.
        """
        self._make()
        lock = RunLock(
            self.path,
            self.config.training.lock_timeout,
            on_wait=lambda message: say("lock", message),
            should_stop=should_stop,
            on_lost=_leave_at_once,
        )
        lock.acquire()
        self._lock = lock
        if fresh:
            self._archive(say)
        self._refuse_other_configuration()
        record = read_record(self.path) if (self.path / "result.json").exists() else {}
        if record.get("status") != "completed":
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
        deadline = time.monotonic() + min(patience, _TOKEN_SECONDS)
        # Listed, not looked up: some clients remember for long that a name did not exist.
        while not (self.path.is_dir() and self.path / token in self.path.iterdir()):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
        return True

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
            self._lock = None

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
        theirs = read_config(path)
        lines = differing_fields(hashed_fields(self.config), hashed_fields(theirs))
        if not lines and (self.path / "result.json").exists():
            known = read_record(self.path).get("config_hash")
            if known not in {None, self.config_hash}:
                lines = [f"config_hash: {self.config_hash[:8]} here, {known[:8]} there (training.init_from)"]
        if lines:
            raise ConfigError(
                "name",
                self.path.name,
                f"is a run of another configuration ({'; '.join(lines)}); choose another name, or --fresh to "
                "archive it and start over",
            )

    def _archive(self, say: Callable[[str, str], None]) -> None:
        present = [name for name in _ARCHIVED if (self.path / name).exists()]
        if not present:
            return
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
        archive = self.path.with_name(f"{self.path.name}.archived-{stamp}")
        number = 1
        while archive.exists():
            number += 1
            archive = archive.with_name(f"{self.path.name}.archived-{stamp}-{number}")
        archive.mkdir()
        for name in present:
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
    """The configuration that a run stored.

    Raises:
        ConfigError: the file cannot be read or is not a configuration.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(str(path), "config.yaml", f"cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(str(path), "config.yaml", "does not hold a configuration")
    try:
        return from_dict(values)
    except TypeError as error:
        raise ConfigError(str(path), "config.yaml", f"holds a value of a wrong type: {error}") from error


class RunLog:
    """What the package logs in one launch: to ``logs/rank_N.log``, and some of it to stderr.

    There go the warnings of rank 0, and the errors of every other machine's first rank: what rank 0
    says is not seen on that machine's screen.

    Args:
        rank: of this process.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._logger = logging.getLogger("accel_train")
        self._handlers: list[logging.Handler] = []
        self.is_on_screen = os.environ.get("LOCAL_RANK", str(rank)) == "0"
        """Whether errors of this process are shown."""
        # Without any handler Python would print the warnings of every rank.
        console = ConsoleHandler(logging.WARNING if rank == 0 else logging.ERROR)
        self._add(console if self.is_on_screen else logging.NullHandler())

    def open(self, run_dir: Path, launch: int) -> None:
        """Append to the rank's file in ``run_dir`` from here on."""
        directory = run_dir / "logs"
        directory.mkdir(exist_ok=True)
        handler = logging.FileHandler(directory / f"rank_{self._rank}.log", encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        self._logger.setLevel(logging.INFO)
        self._add(handler)
        self._logger.info("launch %d, rank %d, pid %d", launch, self._rank, os.getpid())

    def close(self) -> None:
        """Log nowhere any more; safe to call twice."""
        while self._handlers:
            handler = self._handlers.pop()
            self._logger.removeHandler(handler)
            handler.close()

    def _add(self, handler: logging.Handler) -> None:
        self._logger.addHandler(handler)
        self._handlers.append(handler)
