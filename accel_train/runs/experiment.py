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
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from torch import distributed as dist

from accel_train.checkpoints.manifest import step_directory
from accel_train.config.sections import SHARED_CORPORA, EarlierRun, ExperimentConfig, check_output_dir, to_dict
from accel_train.errors import (
    EXIT_FAILED,
    EXIT_OK,
    EXIT_PREEMPTED,
    CheckpointError,
    ConfigError,
    CorpusError,
    Interrupted,
    LostPeer,
    NonFinite,
    PeerFailed,
    Preempted,
    RecordError,
    RunLocked,
)
from accel_train.model.transformer import TransformerLM
from accel_train.process.fault_points import CONCLUSION_BEGUN, SILENT, Observer
from accel_train.process.signals import StopSignal, leaving_while_ranks_meet
from accel_train.ranks.accelerator import arithmetic, build_accelerator, machine
from accel_train.ranks.coordinator import Coordinator
from accel_train.ranks.store import first_line, is_lost_peer
from accel_train.runs.directory import CONFIG_FILE, RunDirectory, RunLog, dump_config
from accel_train.runs.initial_weights import build_model, require_same_files, resolve_init
from accel_train.runs.record import METRICS_FILE
from accel_train.runs.recorder import RecordKeeper
from accel_train.tasks.base import Task, Trained
from accel_train.tasks.registry import build_task
from accel_train.training.callbacks import Callback, LoopState
from accel_train.training.hooks import Hooks, build_hooks
from accel_train.training.losses import fused_cross_entropy
from accel_train.training.non_finite import is_out_of_memory
from accel_train.training.progress import Progress, be_silent, say
from accel_train.training.trainer import Trainer

log = logging.getLogger(__name__)


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
        self.task: Task = build_task(config, observer)
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
            if error.exit_code == EXIT_FAILED:
                self._leave("failed", str(error))
            return error.exit_code
        except (ConfigError, RecordError) as error:
            self.coordinator.announce_failure(error)
            # Where the run directory is ours already: what was wrong came out while preparing the data.
            self._leave("failed", str(error))
            raise
        except RunLocked as error:
            log.error("%s", error)
            return EXIT_PREEMPTED
        except (NonFinite, CheckpointError, CorpusError, OSError) as error:
            return self._fail(error, str(error))
        except Exception as error:
            if self.coordinator.world_size > 1 and is_lost_peer(error):
                # In a collective outside the loop, such as the comparison of all ranks' parameters.
                self._leave_without(LostPeer(f"another rank is gone ({first_line(error)})"))
            if is_out_of_memory(error):
                return self._fail(
                    error,
                    f"out of memory ({first_line(error)}); use a smaller training.batch_size, model.max_seq_len or "
                    "model, or more gradient accumulation",
                )
            self.coordinator.announce_failure(error)
            log.exception("unexpected failure")
            if not self.run_log.is_on_screen:
                traceback.print_exc()
            self._leave("failed", f"{type(error).__name__}: {error}")
            return EXIT_FAILED
        finally:
            self.progress.close()
            self.directory.close()

    def _fail(self, error: BaseException, message: str) -> int:
        """Leave with what people can mend, without a traceback."""
        self.coordinator.announce_failure(error)
        log.error("%s", message)
        self._leave("failed", f"{type(error).__name__}: {message}")
        return EXIT_FAILED

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
        self.coordinator.main_phase("check of the task", lambda should_stop: self.task.check(self.say, should_stop))
        self._check_shared()
        opened = self.coordinator.main_phase("run directory", self._open)
        if opened["status"] == "completed":
            self.say("finished", opened["summary"])
            return EXIT_OK
        self.run_log.open(self.directory.path, opened["launch"])
        dataset, preflight = self._data(init)
        trainer = self._trainer(model, hooks, dataset)
        if self.coordinator.is_main:
            self.keeper.attach(trainer, preflight, machine(self.accelerator) | arithmetic(self.accelerator))
        trainer.fit()
        self._conclude(trainer)
        if self.config.tracking.log_with:
            self.accelerator.end_training()
        if self.coordinator.is_main:
            self.keeper.finish("completed", None)
            self.say("completed", self.keeper.summary())
            self.say("record", str(self.directory.path / "result.json"))
        return EXIT_OK

    def _resolve_init(self) -> Path | None:
        """One choice of the weights to start from for all ranks; they are part of the run's identity."""
        if self.config.training.init_from is None:
            return None

        def resolve(_: object) -> list[str | None]:
            path, digest = resolve_init(self.config, fresh=self.earlier.fresh)
            return [str(path) if path else None, digest]

        name, digest = self.coordinator.main_phase("weights to start from", resolve)
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

    def _data(self, init: Path | None) -> tuple[Any, dict[str, Any]]:
        """The training dataset on every rank; the preflight's findings."""
        shared = self.directory.path.parent / SHARED_CORPORA
        phase = self.coordinator.main_phase
        with self.keeper.clock.timed("corpus"):
            artifacts = phase("corpus", lambda should_stop: self.task.build(shared, self.say, should_stop))
            dataset = self.task.open(artifacts)
            if init is not None:
                phase("weights to start from", lambda _: require_same_files(init, self.task))
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
            loss_fn=fused_cross_entropy,
            evaluate=self._evaluate,
            validation=self.task.validation(),
            callbacks=callbacks,
            run_dir=self.directory.path,
            checkpoint=config.checkpoint,
            seed=config.seed,
            hooks=hooks,
            config_hash=self.directory.config_hash,
            extra_files={CONFIG_FILE: dump_config(config).encode(), **self.task.files()},
            data_digests=self.task.digests(),
            accelerator=self.accelerator,
            coordinator=self.coordinator,
            logs=[self.directory.path / METRICS_FILE],
            restart=self.earlier.on_damage == "restart",
            observer=self.observer,
        )

    def _evaluate(self, model: torch.nn.Module, state: LoopState, should_stop: Callable[[], bool]) -> dict[str, Any]:
        evaluation = self.task.evaluate(model, state.losses, should_stop)
        passed = evaluation.verdict is not None and evaluation.verdict.passed
        return {**evaluation.to_dict(), "stop": passed and self.config.stop_on_pass}

    def _conclude(self, trainer: Trainer) -> None:
        """The task's last judgement of the finished model; its verdict is the record's."""
        state, per_epoch = trainer.state, trainer.plan.steps_per_epoch
        epochs = [
            state.train_loss[start : start + per_epoch] for start in range(0, state.step - per_epoch + 1, per_epoch)
        ]
        trained = Trained(
            model=trainer.unwrapped_model,
            checkpoint=self.directory.path / "checkpoints" / step_directory(state.step),
            evaluation=state.evaluations[-1] if state.evaluations else {},
            epoch_losses=[sum(losses) / len(losses) for losses in epochs],
        )

        def conclude(should_stop: Callable[[], bool]) -> None:
            self.observer.reached(CONCLUSION_BEGUN)
            evaluation = self.task.conclude(trained, should_stop)
            if evaluation is not None:
                self.keeper.conclude(evaluation.to_dict())

        with self.keeper.clock.timed("validation"):
            self.coordinator.main_phase("validation of the finished model", conclude)

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
