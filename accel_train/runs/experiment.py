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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from accelerate import Accelerator
from torch import distributed as dist

from accel_train import errors
from accel_train.checkpoints.manifest import step_directory
from accel_train.config.fields import to_dict
from accel_train.config.sections import SHARED_CORPORA, EarlierRun, ExperimentConfig
from accel_train.model.size import count_parameters, is_out_of_memory
from accel_train.model.transformer import TransformerLM
from accel_train.process.console import RunLog, say
from accel_train.process.fault_points import CONCLUSION_BEGUN
from accel_train.process.signals import StopSignal, leaving_while_ranks_meet
from accel_train.process.work import WorkContext, be_silent, pass_by
from accel_train.ranks.accelerator import arithmetic, build_accelerator, machine
from accel_train.ranks.coordinator import Coordinator
from accel_train.ranks.store import first_line, is_lost_peer
from accel_train.runs.directory import CONFIG_FILE, RunDirectory, check_output_dir, dump_config
from accel_train.runs.initial_weights import build_model, require_same_files, resolve_weights
from accel_train.runs.metrics_log import METRICS_FILE
from accel_train.runs.record import RECORD_FILE
from accel_train.runs.recorder import Recorder, Trackers
from accel_train.tasks.base import Task, Trained
from accel_train.tasks.registry import build_task
from accel_train.training.callbacks import Callback, LoopState
from accel_train.training.hooks import Hooks, build_hooks
from accel_train.training.losses import fused_cross_entropy
from accel_train.training.progress import Progress
from accel_train.training.services import Services
from accel_train.training.trainer import Trainer

T = TypeVar("T")

log = logging.getLogger(__name__)

_FRESH = "--fresh archives the run and starts over"
_ADVICE: dict[type[BaseException], str] = {
    errors.CheckpointMismatch: f"; {_FRESH}, another --name or --output_dir starts a new run",
    errors.CheckpointsDamaged: f"; --on_damage restart starts over from step 0, {_FRESH}",
}
"""Options of the command line that help against an error, by its class."""


def run(
    config: ExperimentConfig,
    *,
    earlier: EarlierRun = EarlierRun(),  # noqa: B008 - it is frozen
    command: Sequence[str] = (),
    reached: Callable[[str], None] = pass_by,
) -> int:
    """Run an experiment to its end, or resume it; returns the process's exit code.

    Args:
        config: what to run.
        earlier: what becomes of an earlier run of the same name.
        command: the command line, for the record.
        reached: hears of every fault point.

    Raises:
        ConfigError: the configuration cannot be run; nothing has been written.
    """
    check_output_dir(config)
    stop = StopSignal()
    with stop.installed(until_exit=True):
        stop.die_with_launcher()
        try:
            tracking = config.tracking.log_with
            with leaving_while_ranks_meet(errors.EXIT_PREEMPTED, stop):
                accelerator = build_accelerator(config.training, log_with=tracking, log_dir=config.output_dir)
                coordinator = Coordinator(stop, config.training.timeout_seconds)
        except KeyboardInterrupt:
            return errors.EXIT_PREEMPTED
        except RuntimeError as error:
            if not is_lost_peer(error):
                raise
            if stop.requested:
                # The others were asked as well, and have left a moment before this one.
                return errors.EXIT_PREEMPTED
            log.error("accel-train: error: a process was gone before all had met (%s)", first_line(error))
            return errors.EXIT_FAILED
        run_log, code = RunLog(coordinator.rank), None
        try:
            work = WorkContext(say if coordinator.is_main else be_silent, reached=reached)
            code = _Experiment(config, earlier, command, accelerator, coordinator, run_log, work).run()
            return code
        finally:
            run_log.close()
            _end_process_group(code)


def _end_process_group(code: int | None) -> None:
    """End the group of the ranks; ``code`` is what the process leaves with, None while an error is on its way."""
    if not dist.is_initialized():
        return
    if dist.get_backend() != "nccl" or code in {errors.EXIT_OK, errors.EXIT_PREEMPTED}:
        dist.destroy_process_group()
    elif code is not None:
        _leave_at_once(code)  # an orderly end waits for collectives in flight, which a failed rank does not answer


def _leave_at_once(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@dataclass
class _Experiment:
    """The phases of one launch, and what becomes of their failures."""

    config: ExperimentConfig
    earlier: EarlierRun
    command: Sequence[str]
    accelerator: Accelerator
    coordinator: Coordinator
    run_log: RunLog
    work: WorkContext
    recorder: Recorder | None = None

    def __post_init__(self) -> None:
        self.say = self.work.say
        self.task = build_task(self.config)
        self.progress = Progress(self.task.headline)

    def run(self) -> int:
        """Run all phases; returns the exit code."""
        try:
            return self._run()
        except (errors.Preempted, errors.Interrupted) as outcome:
            self._leave("preempted", str(outcome))
            self.say("preempted", f"{outcome}; run the same command again to continue")
            return errors.EXIT_PREEMPTED
        except KeyboardInterrupt:
            self.say("stopped", "at once, by a second interrupt; the same command goes on from the last checkpoint")
            return errors.EXIT_PREEMPTED
        except errors.LostPeer as error:
            self._leave_without(error)
        except errors.PeerFailed as error:
            log.error("%s", error)
            if error.exit_code == errors.EXIT_FAILED:
                self._leave("failed", str(error))
            return error.exit_code
        except (errors.RunError, OSError) as error:
            return self._fail(error, f"{error}{_ADVICE.get(type(error), '')}")
        except Exception as error:
            if self.coordinator.world_size > 1 and is_lost_peer(error):
                # In a collective outside the loop, such as the comparison of all ranks' parameters.
                self._leave_without(errors.LostPeer(f"another rank is gone ({first_line(error)})"))
            if is_out_of_memory(error):
                cure = "use a smaller training.batch_size, model.max_seq_len or model, or more gradient accumulation"
                return self._fail(error, f"out of memory ({first_line(error)}); {cure}")
            self.coordinator.announce_failure(error)
            log.exception("unexpected failure")
            if not self.run_log.is_on_screen:
                traceback.print_exc()
            self._leave("failed", f"{type(error).__name__}: {error}")
            return errors.EXIT_FAILED
        finally:
            self.progress.close()
            if self.recorder is not None:
                self.recorder.directory.close()

    def _fail(self, error: BaseException, message: str) -> int:
        """Leave with what people can mend, without a traceback; a wrong configuration is the command line's to tell."""
        code: int = getattr(error, "exit_code", errors.EXIT_FAILED)
        self.coordinator.announce_failure(error)
        if code not in {errors.EXIT_FAILED, errors.EXIT_PREEMPTED}:
            # Where the run directory is ours already: what was wrong came out while preparing the data.
            self._leave("failed", message)
            raise error
        log.error("%s", message)
        if code == errors.EXIT_FAILED:
            self._leave("failed", f"{type(error).__name__}: {message}")
        return code

    def _leave_without(self, error: errors.LostPeer) -> NoReturn:
        """Leave at once: nothing can be agreed any more, so nothing is saved and the record stays ``running``."""
        log.error("%s", self.coordinator.named(error))
        # The process group is beyond an orderly shutdown: leave before its destructors wait.
        _leave_at_once(errors.EXIT_FAILED)

    def _run(self) -> int:
        # Before anything is written: a hook or weights that do not fit are the user's to mend.
        start, digest = self._start_weights()
        model = build_model(self.config, self.task, start)
        hooks = build_hooks(self.config.hooks, model)
        self._phase("check of the task", self.task.check)
        directory = RunDirectory(self.config, digest)
        recorder = self.recorder = Recorder(directory, self.task, self.command, self.work)
        self._check_shared(directory)
        opened = self._phase("run directory", lambda work: self._open(recorder, work))
        if opened["status"] == "completed":
            self.say("finished", opened["summary"])
            return errors.EXIT_OK
        self.run_log.open(directory.path, opened["launch"])
        shared = directory.path.parent / SHARED_CORPORA
        with recorder.clock.timed("corpus"):
            dataset = self.task.open(self._phase("corpus", lambda work: self.task.build(shared, work)))
            if start is not None:
                self._phase("weights to start from", lambda _: require_same_files(start, self.task))
        with recorder.clock.timed("preflight"):
            preflight = self._phase("preflight", self.task.preflight)
        trainer = self._trainer(recorder, model, hooks, dataset)
        if self.coordinator.is_main:
            decides = machine(self.accelerator) | arithmetic(self.accelerator)
            recorder.follow(trainer, preflight=preflight, machine=decides, hooks=list(hooks.names))
        trainer.fit()
        self._conclude(trainer, recorder)
        if self.config.tracking.log_with:
            self.accelerator.end_training()
        if self.coordinator.is_main:
            recorder.finish("completed", None)
            self.say("completed", recorder.summary())
            self.say("record", str(directory.path / RECORD_FILE))
        return errors.EXIT_OK

    def _phase(self, name: str, work: Callable[[WorkContext], T]) -> T:
        """Have ``work`` done on the main process; every rank gets its result."""
        return self.coordinator.main_phase(name, lambda should_stop: work(replace(self.work, should_stop=should_stop)))

    def _start_weights(self) -> tuple[Path | None, str | None]:
        """One choice of the weights to start from for all ranks, and their digest: it is part of the run's identity."""
        if self.config.start.weights is None:
            return None, None

        def resolve(_work: WorkContext) -> list[str | None]:
            path, digest = resolve_weights(self.config, fresh=self.earlier.fresh)
            return [str(path) if path else None, digest]

        name, digest = self._phase("weights to start from", resolve)
        return Path(name) if name else None, digest

    def _check_shared(self, directory: RunDirectory) -> None:
        """Refuse a run directory that only some ranks see: their checkpoints would be torn apart."""
        if self.coordinator.world_size == 1:
            return
        name = "look at the run directory"
        token = self._phase(name, lambda _: directory.leave_token())
        place = f"{socket.gethostname()}:{directory.path.absolute()}"
        seen = directory.sees_token(token, self.config.training.timeout_seconds / 2)
        found = self.coordinator.gather(name, [seen, place])
        blind = next((rank for rank, (sees, _) in enumerate(found) if not sees), None)
        self._phase(name, lambda _: directory.remove_token(token, refused=blind is not None))
        if blind is not None:
            where = f"{found[0][1]} is not there for rank {blind} in {found[blind][1]}"
            cure = "name a directory that every machine sees, such as one on a network file system"
            rule = f"is not shared by all processes: what rank 0 writes to {where}; {cure}"
            raise errors.ConfigError("output_dir", self.config.output_dir, rule)

    def _open(self, recorder: Recorder, work: WorkContext) -> dict[str, Any]:
        """On the main process: the lock, then the first file."""
        found = recorder.directory.open(work, fresh=self.earlier.fresh)
        self.say("run", str(recorder.directory.path))
        recorder.start(found)
        record = recorder.record
        return {"status": record.status, "launch": record.provenance.launches, "summary": recorder.summary()}

    def _trainer(self, recorder: Recorder, model: TransformerLM, hooks: Hooks, dataset: Any) -> Trainer:
        config, directory = self.config, recorder.directory
        callbacks: list[Callback] = []
        if config.tracking.log_with:
            self.accelerator.project_configuration.logging_dir = str(directory.path / "tracking")
            callbacks.append(Trackers(self.accelerator, config.tracking.project, to_dict(config)))
        if self.coordinator.is_main:
            callbacks += [self.progress, recorder]
        device, world = machine(self.accelerator)["device"], self.coordinator.world_size
        processes = "1 process" if world == 1 else f"{world} processes"
        self.say("model", f"{count_parameters(model):,} parameters on {device}, {processes}")
        return Trainer(
            model,
            dataset,
            config.training,
            run_dir=directory.path,
            loss_fn=fused_cross_entropy,
            evaluate=self._evaluate,
            validation=self.task.validation(),
            callbacks=callbacks,
            hooks=hooks,
            seed=config.seed,
            checkpoint=config.checkpoint,
            accelerator=self.accelerator,
            services=Services(
                coordinator=self.coordinator,
                config_hash=directory.config_hash,
                extra_files={CONFIG_FILE: dump_config(config).encode(), **self.task.files()},
                data_digests=self.task.digests(),
                logs=[directory.path / METRICS_FILE],
                restart=self.earlier.on_damage == "restart",
                reached=self.work.reached,
            ),
        )

    def _evaluate(self, model: torch.nn.Module, state: LoopState, should_stop: Callable[[], bool]) -> dict[str, Any]:
        return judged(self.task, model, state.losses, replace(self.work, should_stop=should_stop))

    def _conclude(self, trainer: Trainer, recorder: Recorder) -> None:
        """The task's last judgement of the finished model; its verdict is the record's."""
        state = trainer.state
        checkpoint = recorder.directory.path / "checkpoints" / step_directory(state.step)
        last = state.evaluations[-1] if state.evaluations else {}
        means = epoch_means(state.train_loss, trainer.plan.steps_per_epoch)

        def conclude(work: WorkContext) -> None:
            work.reached(CONCLUSION_BEGUN)
            concluded = self.task.conclude(Trained(trainer.unwrapped_model, checkpoint, last, means), work)
            if concluded is not None:
                recorder.conclude(concluded.to_dict())

        with recorder.clock.timed("validation"):
            self._phase("validation of the finished model", conclude)

    def _leave(self, status: str, reason: str) -> None:
        """Write the last record of a launch that did not complete; must not hide why it did not."""
        self.progress.close()
        if self.coordinator.is_main and self.recorder is not None:
            try:
                self.recorder.finish(status, reason)
            except OSError as error:
                log.error("the record could not be brought up to date: %s", error)


def judged(task: Task, model: torch.nn.Module, losses: Mapping[str, float], work: WorkContext) -> dict[str, Any]:
    """Return the evaluation of a model in training as JSON values; ``stop`` says whether training may end.

    Args:
        task: its data are opened.
        model: unwrapped.
        losses: mean loss of every validation dataset.
        work: asked now and then whether to stop.
    """
    evaluation = task.evaluate(model, losses, work)
    passed = evaluation.verdict is not None and evaluation.verdict.passed
    return {**evaluation.to_dict(), "stop": passed and task.stops_on_pass}


def epoch_means(losses: Sequence[float], steps_per_epoch: int) -> list[float]:
    """Return the mean of the training losses of every whole epoch."""
    starts = range(0, len(losses) - steps_per_epoch + 1, steps_per_epoch)
    return [sum(losses[start : start + steps_per_epoch]) / steps_per_epoch for start in starts]
