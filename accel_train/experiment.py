"""One run: configuration, run directory, task, trainer, record.

Everything that touches the run directory happens on the main process, inside a main-only phase
or a callback of the main process; the other ranks learn the outcome before they go on. All
checks that can refuse a configuration come before the first file is written.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_model as load_weights
from torch import distributed as dist

from accel_train.config import (
    SHARED_CORPORA,
    ConfigError,
    EarlierRun,
    ExperimentConfig,
    check_output_dir,
    config_hash,
    run_directory,
    to_dict,
)
from accel_train.interrupt import Interrupted
from accel_train.lock import RunLocked
from accel_train.model.transformer import TransformerLM
from accel_train.observer import SILENT, Observer
from accel_train.record import METRICS_FILE, RECORD_FILE, RecordError, read_record
from accel_train.run_record import RecordKeeper
from accel_train.rundir import CONFIG_FILE, RunDirectory, RunLog, dump_config, read_config
from accel_train.tasks.base import Task
from accel_train.tasks.walks import CorpusError, WalksTask
from accel_train.training.board import LostPeer, first_line, is_lost_peer
from accel_train.training.callbacks import Callback, LoopState
from accel_train.training.coordination import Coordinator, PeerFailed
from accel_train.training.diagnosis import NonFinite
from accel_train.training.hooks import Hooks, build_hooks
from accel_train.training.manifest import (
    CheckpointError,
    list_checkpoints,
    newest_sound,
    read_manifest,
    require_configuration,
    verify,
)
from accel_train.training.preemption import StopSignal, leaving_while_ranks_meet
from accel_train.training.progress import Progress, be_silent, say
from accel_train.training.runtime import arithmetic, build_accelerator, machine
from accel_train.training.trainer import Preempted, Trainer

log = logging.getLogger(__name__)

EXIT_COMPLETED, EXIT_FAILED, EXIT_USAGE, EXIT_PREEMPTED = 0, 1, 2, 75
WEIGHTS = "model.safetensors"
_CODE_OF_PEER = {"ConfigError": EXIT_USAGE, "RecordError": EXIT_USAGE, "RunLocked": EXIT_PREEMPTED}


def run(
    config: ExperimentConfig,
    *,
    earlier: EarlierRun = EarlierRun(),  # noqa: B008 - it is frozen
    command: Sequence[str] = (),
    observer: Observer = SILENT,
) -> int:
    """Run an experiment to its end, or resume it; returns the process's exit code.

    Args:
        config: what to run.
        earlier: what becomes of an earlier run of the same name.
        command: the command line, for the record.
        observer: hears of every point at which a fault may fall.

    Raises:
        ConfigError: the configuration cannot be run; nothing has been written.
    """
    check_output_dir(config)
    stop = StopSignal()
    with stop.installed(until_exit=True):
        stop.die_with_launcher()
        try:
            tracking = config.tracking.log_with
            with leaving_while_ranks_meet(EXIT_PREEMPTED, stop):
                accelerator = build_accelerator(config.training, log_with=tracking, log_dir=config.output_dir)
                coordinator = Coordinator(stop, config.training.timeout_seconds)
        except KeyboardInterrupt:
            return EXIT_PREEMPTED
        except RuntimeError as error:
            if not is_lost_peer(error):
                raise
            if stop.requested:
                # The others were asked as well, and have left a moment before this one.
                return EXIT_PREEMPTED
            log.error("accel-train: error: a process was gone before all had met (%s)", first_line(error))
            return EXIT_FAILED
        run_log = RunLog(coordinator.rank)
        try:
            experiment = _Experiment(config, earlier, accelerator, coordinator, command, run_log, observer)
            return experiment.run()
        finally:
            run_log.close()
            if dist.is_initialized():
                dist.destroy_process_group()


class _Experiment:
    """The phases of one launch, and what becomes of their failures."""

    def __init__(
        self,
        config: ExperimentConfig,
        earlier: EarlierRun,
        accelerator: Accelerator,
        coordinator: Coordinator,
        command: Sequence[str],
        run_log: RunLog,
        observer: Observer,
    ) -> None:
        self.config, self.command, self.run_log = config, command, run_log
        self.earlier, self.observer = earlier, observer
        self.accelerator, self.coordinator = accelerator, coordinator
        self.task: Task = WalksTask(config, observer)
        self.say = say if coordinator.is_main else be_silent
        self.progress = Progress()
        self.directory = RunDirectory(config)
        self.keeper = RecordKeeper(self.directory, command, observer)

    def run(self) -> int:
        """Run all phases; returns the exit code."""
        try:
            return self._run()
        except (Preempted, Interrupted) as outcome:
            self._leave("preempted", str(outcome))
            self.say("preempted", f"{outcome}; run the same command again to continue")
            return EXIT_PREEMPTED
        except KeyboardInterrupt:
            self.say("stopped", "at once, by a second interrupt; the same command goes on from the last checkpoint")
            return EXIT_PREEMPTED
        except LostPeer as error:
            self._leave_without(error)
        except PeerFailed as error:
            log.error("%s", error)
            code = _CODE_OF_PEER.get(error.kind, EXIT_FAILED)
            if code == EXIT_FAILED:
                self._leave("failed", str(error))
            return code
        except (ConfigError, RecordError) as error:
            self.coordinator.announce_failure(error)
            raise
        except RunLocked as error:
            log.error("%s", error)
            return EXIT_PREEMPTED
        except (NonFinite, CheckpointError, CorpusError, OSError, MemoryError, torch.OutOfMemoryError) as error:
            self.coordinator.announce_failure(error)
            log.error("%s", error)
            self._leave("failed", f"{type(error).__name__}: {error}")
            return EXIT_FAILED
        except Exception as error:
            if self.coordinator.world_size > 1 and is_lost_peer(error):
                # In a collective outside the loop, such as the comparison of all ranks' parameters.
                self._leave_without(LostPeer(f"another rank is gone ({first_line(error)})"))
            self.coordinator.announce_failure(error)
            log.exception("unexpected failure")
            if not self.run_log.is_on_screen:
                traceback.print_exc()
            self._leave("failed", f"{type(error).__name__}: {error}")
            return EXIT_FAILED
        finally:
            self.progress.close()
            self.directory.close()

    def _leave_without(self, error: LostPeer) -> NoReturn:
        """Leave at once: nothing can be agreed any more, so nothing is saved and the record stays ``running``."""
        log.error("%s", self.coordinator.named(error))
        # The process group is beyond an orderly shutdown: leave before its destructors wait.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(EXIT_FAILED)

    def _run(self) -> int:
        # Before anything is written: a hook or weights that do not fit are the user's to mend.
        init = self._resolve_init()
        model = build_model(self.config, self.task, init)
        hooks = build_hooks(self.config.hooks, model)
        self.coordinator.main_phase("check of the task", lambda _: self.task.check())
        self._check_shared()
        opened = self.coordinator.main_phase("run directory", self._open)
        if opened["status"] == "completed":
            self.say("finished", opened["summary"])
            return EXIT_COMPLETED
        self.run_log.open(self.directory.path, opened["launch"])
        dataset, preflight = self._data()
        trainer = self._trainer(model, hooks, dataset)
        if self.coordinator.is_main:
            self.keeper.attach(trainer, preflight, machine(self.accelerator) | arithmetic(self.accelerator))
        trainer.fit()
        if self.config.tracking.log_with:
            self.accelerator.end_training()
        if self.coordinator.is_main:
            self.keeper.finish("completed", None)
            self.say("completed", self.keeper.summary())
            self.say("record", str(self.directory.path / "result.json"))
        return EXIT_COMPLETED

    def _resolve_init(self) -> Path | None:
        """One choice of the weights to start from for all ranks; they are part of the run's identity."""
        if self.config.training.init_from is None:
            return None
        name, digest = self.coordinator.main_phase(
            "weights to start from", lambda _: _as_json(resolve_init(self.config, fresh=self.earlier.fresh))
        )
        self.directory = RunDirectory(self.config, digest)
        self.keeper = RecordKeeper(self.directory, self.command, self.observer)
        return Path(name) if name else None

    def _check_shared(self) -> None:
        """Refuse a run directory that only some ranks see: their checkpoints would be torn apart."""
        if self.coordinator.world_size == 1:
            return
        name, directory = "look at the run directory", self.directory
        phase, gather = self.coordinator.main_phase, self.coordinator.gather
        token = phase(name, lambda _: directory.leave_token())
        place = f"{socket.gethostname()}:{directory.path.absolute()}"
        found = gather(name, [directory.sees_token(token, self.config.training.timeout_seconds / 2), place])
        refused = not all(sees for sees, _ in found)
        phase(name, lambda _: directory.remove_token(token, refused=refused))
        for rank, (sees, theirs) in enumerate(found):
            if not sees:
                raise ConfigError(
                    "output_dir",
                    self.config.output_dir,
                    f"is not shared by all processes: what rank 0 writes to {found[0][1]} is not there for rank {rank} "
                    f"in {theirs}; name a directory that every machine sees, such as one on a network file system",
                )

    def _open(self, should_stop: Callable[[], bool]) -> dict[str, Any]:
        """On the main process: the lock, then the first file."""
        record = self.directory.open(fresh=self.earlier.fresh, should_stop=should_stop, say=self.say)
        self.say("run", str(self.directory.path))
        self.keeper.start(record)
        return {"status": self.keeper.found_status, "launch": self.keeper.launch, "summary": self.keeper.summary()}

    def _data(self) -> tuple[Any, dict[str, Any]]:
        """The training dataset on every rank; the preflight's findings."""
        shared = self.directory.path.parent / SHARED_CORPORA
        phase = self.coordinator.main_phase
        with self.keeper.clock.timed("corpus"):
            artifacts = phase("corpus", lambda should_stop: self.task.build(shared, self.say, should_stop))
            dataset = self.task.open(artifacts)
        with self.keeper.clock.timed("preflight"):
            preflight = phase("preflight", lambda _: self.task.preflight(self.say))
        return dataset, preflight

    def _trainer(self, model: TransformerLM, hooks: Hooks, dataset: Any) -> Trainer:
        config = self.config
        callbacks: list[Callback] = []
        if config.tracking.log_with:
            self.accelerator.project_configuration.logging_dir = str(self.directory.path / "tracking")
            self.accelerator.init_trackers(config.tracking.project, dict(_flat(to_dict(config))))
            callbacks.append(_Trackers(self.accelerator))
        if self.coordinator.is_main:
            callbacks += [self.progress, self.keeper]
        self.keeper.hooks = list(hooks.names)
        count = sum(p.numel() for p in model.parameters())
        world = self.coordinator.world_size
        processes = "1 process" if world == 1 else f"{world} processes"
        self.say("model", f"{count:,} parameters on {machine(self.accelerator)['device']}, {processes}")
        return Trainer(
            model,
            dataset,
            config.training,
            evaluate=self._evaluate,
            callbacks=callbacks,
            run_dir=self.directory.path,
            checkpoint=config.checkpoint,
            seed=config.seed,
            hooks=hooks,
            config_hash=self.directory.config_hash,
            extra_files={CONFIG_FILE: dump_config(config).encode()},
            accelerator=self.accelerator,
            coordinator=self.coordinator,
            logs=[self.directory.path / METRICS_FILE],
            restart=self.earlier.on_damage == "restart",
            observer=self.observer,
        )

    def _evaluate(self, model: torch.nn.Module, _state: LoopState, should_stop: Callable[[], bool]) -> dict[str, Any]:
        verdict = self.task.evaluate(model, should_stop)
        return {**verdict.to_dict(), "stop": verdict.passed and self.config.stop_on_pass}

    def _leave(self, status: str, reason: str) -> None:
        """Write the last record of a launch that did not complete; must not hide why it did not."""
        self.progress.close()
        if self.coordinator.is_main:
            try:
                self.keeper.finish(status, reason)
            except OSError as error:
                log.error("the record could not be brought up to date: %s", error)


class _Trackers(Callback):
    """Sends every log line to Accelerate's trackers."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator

    def on_log(self, state: LoopState, line: dict[str, Any]) -> None:
        self._accelerator.log({k: v for k, v in line.items() if k != "step"}, step=line["step"])

    def on_evaluate(self, state: LoopState, evaluation: dict[str, Any]) -> None:
        figures = {k: v for k, v in evaluation.get("metrics", {}).items() if v is not None}
        self._accelerator.log(figures, step=evaluation["step"])


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, int | float | str]]:
    """Dotted names and plain values, as trackers want their hyperparameters."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value if isinstance(value, int | float | str) else str(value)


# -- weights -------------------------------------------------------------------------------


def build_model(config: ExperimentConfig, task: Task, init: Path | None) -> TransformerLM:
    """A freshly initialised model (the same on every rank), or one with the weights of checkpoint ``init``.

    Raises:
        ConfigError: the weights do not fit the model.
        CheckpointError: they are no safetensors file.
    """
    torch.manual_seed(config.seed)
    model = TransformerLM(config.model, task.vocab_size)
    if init is not None:
        try:
            load_weights(model, init / WEIGHTS)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{init / WEIGHTS} cannot be loaded: {error}") from error
        except (RuntimeError, ValueError) as error:
            reason = textwrap.shorten(str(error), 300, placeholder=" ...")  # torch names every parameter
            raise ConfigError(
                "training.init_from", str(init), f"does not fit this model; make the model sections agree ({reason})"
            ) from error
    return model


def resolve_init(config: ExperimentConfig, *, fresh: bool = False) -> tuple[Path | None, str]:
    """The checkpoint that ``training.init_from`` names, and the digest of its weights.

    A named run that has checkpoints of its own keeps the digest that it started from, and needs
    the source no more: then the path is None.

    Raises:
        ConfigError: it is neither a sound checkpoint nor a completed run.
    """
    source = str(config.training.init_from)
    own = run_directory(config)
    if config.name and not fresh and list_checkpoints(own / "checkpoints") and (own / RECORD_FILE).exists():
        earlier = read_record(own)
        if earlier["config"]["training"]["init_from"] == source:
            return None, str(earlier["provenance"]["init_digest"])
    path = Path(source)
    found = list_checkpoints(path / "checkpoints")
    if found and read_record(path)["status"] != "completed":
        # Its newest checkpoint changes, and the identity of this run would change with it.
        rule = f"is a run that is not completed; let it end, or name one of its checkpoints, such as {found[-1][1]}"
        raise ConfigError("training.init_from", source, rule)
    if not found and not path.is_dir():
        rule = "is not a directory; name a completed run or a checkpoint"
        raise ConfigError("training.init_from", source, rule)
    checkpoint = found[-1][1] if found else path
    problems = verify(checkpoint)
    files = {} if problems else read_manifest(checkpoint)["files"]
    if not problems and WEIGHTS not in files:
        problems = [f"{WEIGHTS} is missing"]
    if problems:
        rule = f"holds no sound checkpoint ({'; '.join(problems)}); name another"
        raise ConfigError("training.init_from", source, rule)
    return checkpoint, str(files[WEIGHTS]["sha256"])


def _as_json(choice: tuple[Path | None, str]) -> list[str | None]:
    return [str(choice[0]) if choice[0] else None, choice[1]]


def load_model(run_dir: Path) -> tuple[TransformerLM, WalksTask, int]:
    """The newest sound weights of a run, its task with the data opened, and their step.

    Raises:
        ConfigError: there is no such run, or it has no checkpoint yet.
        CheckpointError: all its checkpoints are damaged, or the newest belongs to another configuration.
    """
    if not (run_dir / CONFIG_FILE).is_file():
        raise ConfigError("RUN", str(run_dir), f"is not a run directory (it has no {CONFIG_FILE})")
    config = read_config(run_dir / CONFIG_FILE)
    checkpoint = newest_sound(run_dir / "checkpoints")
    if checkpoint is None:
        raise ConfigError("RUN", str(run_dir), "has no checkpoint yet; let it train first")
    started_from = read_record(run_dir)["provenance"]["init_digest"] if config.training.init_from else None
    require_configuration(checkpoint, config_hash(config, started_from), "put the run's own checkpoints back")
    task = WalksTask(config)
    task.open(task.build(run_dir.parent / SHARED_CORPORA, be_silent, lambda: False))
    model = build_model(config, task, checkpoint).to(Accelerator().device)
    return model, task, int(read_manifest(checkpoint)["step"])


def evaluate(run_dir: Path) -> dict[str, Any]:
    """Judge the newest checkpoint of a run by its gate; returns the verdict as JSON values."""
    model, task, step = load_model(run_dir)
    return {"run": str(run_dir), "step": step, **task.evaluate(model, lambda: False).to_dict()}


def generate_samples(run_dir: Path, num: int, *, temperature: float = 0.0) -> list[list[int]]:
    """``num`` continuations of held-out prompts by the newest checkpoint of a run."""
    model, task, _ = load_model(run_dir)
    return task.generate(model, num, temperature)
