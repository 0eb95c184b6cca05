"""The loop: forward, loss, backward, clip, optimizer, scheduler, zero_grad - and nothing in between.

Between two log boundaries the loop asks the device nothing: losses go into a buffer on the
device, the order of the data is a pure function of (seed, epoch, step), and the agreement to
stop is read one step late. What may differ between two ranks (a signal, a NaN, the verdict of
an evaluation, the choice of a checkpoint) is agreed by all of them before anybody acts.
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device, set_seed
from torch import nn

from accel_train.checkpoints.checkpointer import Checkpointer, derive_rank_seed
from accel_train.checkpoints.manifest import require_data
from accel_train.checkpoints.state import TrainingState
from accel_train.config.sections import CheckpointConfig, TrainingConfig, canonical_json, result_values
from accel_train.data.loader import DatasetWithIds, build_loader, count_tokens
from accel_train.data.on_device import resident
from accel_train.errors import CheckpointError, Interrupted, LostPeer, NonFinite, PeerFailed, Preempted
from accel_train.process.fault_points import EVALUATION_BEGUN, SILENT, STEP_DONE, Observer
from accel_train.process.malloc import keep_freed_memory
from accel_train.process.signals import StopSignal
from accel_train.process.stopwatch import Stopwatch
from accel_train.ranks.accelerator import (
    arithmetic,
    build_accelerator,
    check_accelerator,
    machine,
    preserved_random_state,
    warm_up_buckets,
)
from accel_train.ranks.coordinator import Coordinator
from accel_train.ranks.store import first_line, is_lost_peer
from accel_train.training.callbacks import Callback, LoopState, overriding
from accel_train.training.evaluation import Share, mean_loss
from accel_train.training.hooks import Hooks
from accel_train.training.loss_buffer import Ledger
from accel_train.training.losses import next_token_cross_entropy
from accel_train.training.non_finite import first_bad_tensor
from accel_train.training.optimizer import build_optimizer
from accel_train.training.plan import Plan
from accel_train.training.step import LossFunction, Outcome, Step

log = logging.getLogger(__name__)

Evaluator = Callable[[nn.Module, LoopState, Callable[[], bool]], dict[str, Any]]
"""``evaluator(model, loop_state, should_stop)``: called on the main process with the unwrapped
model; returns JSON values. ``"passed": True`` marks the checkpoint to keep, ``"stop": True`` ends
training, ``"samples"`` are handed to the callbacks and not kept in the state. The training's random
states are put back after it."""


class Trainer:
    """Trains a model on a map-style dataset.

        state = Trainer(model, dataset, TrainingConfig(max_epochs=3)).fit()

    Args:
        model: returns logits ``(batch, time, vocabulary)`` (or whatever ``loss_fn`` needs).
        dataset: ``len()`` and ``[i]``, items ``(inputs, targets)`` or a dict; ``__getitems__(ids)``
            may return a whole batch.
        config: the loop's configuration.
        loss_fn: ``loss_fn(model, batch)`` returns a scalar mean; default next-token cross-entropy.
        evaluate: see :data:`Evaluator`; after every epoch, or every ``eval_interval`` steps, and at the end.
        validation: held-out datasets by name, each a map-style dataset as ``dataset`` is. Their mean loss per token,
            over all ranks, is measured whenever an evaluation is due and stands in ``loop_state.losses``
            and, as ``<name>_loss``, among the evaluation's ``metrics``. The checkpoint with the lowest loss on
            ``val`` is kept.
        callbacks: see :class:`Callback`.
        run_dir: where ``checkpoints/`` goes; ``fit`` resumes from there. None: nothing is written.
        checkpoint: when and which checkpoints are kept.
        seed: of the data order, dropout and everything else random in the loop.
        hooks: forward and update hooks, already built.
        config_hash: identifies the experiment in the manifest; default: the hash of ``config``, seed and size.
        extra_files: small files stored in every checkpoint.
        data_digests: what the data is made of, by name; a checkpoint that saw other data is refused.
        accelerator: as :func:`build_accelerator` returns it; default: built here.
        coordinator: agreement between the ranks, whose stop flag somebody sets; default: made here, and
            ``fit`` handles the stop signals itself when there is a run directory.
        logs: files that must be on disk before a checkpoint counts, such as a log of metrics.
        restart: start over when every checkpoint is damaged, instead of refusing.
        observer: hears of every point at which a fault may fall.

    Raises:
        ConfigError: the dataset is smaller than one batch, or the batch cannot be split.
    """

    def __init__(
        self,
        model: nn.Module,
        dataset: Any,
        config: TrainingConfig | None = None,
        *,
        loss_fn: LossFunction = next_token_cross_entropy,
        evaluate: Evaluator | None = None,
        validation: Mapping[str, Any] | None = None,
        callbacks: Sequence[Callback] = (),
        run_dir: str | Path | None = None,
        checkpoint: CheckpointConfig | None = None,
        seed: int = 42,
        hooks: Hooks | None = None,
        config_hash: str | None = None,
        extra_files: Mapping[str, bytes] | None = None,
        data_digests: Mapping[str, str] | None = None,
        accelerator: Accelerator | None = None,
        coordinator: Coordinator | None = None,
        logs: Sequence[Path] = (),
        restart: bool = False,
        observer: Observer = SILENT,
    ) -> None:
        self.config = config or TrainingConfig()
        self.checkpoint_config = checkpoint or CheckpointConfig()
        self.seed = seed
        self.accelerator = accelerator or build_accelerator(self.config)
        check_accelerator(self.accelerator, self.config)
        self.state = TrainingState()
        self.tokens_at_start = 0
        self.clock = Stopwatch()
        self._handles_signals = coordinator is None and run_dir is not None
        self._coordinator = coordinator or Coordinator(StopSignal(), self.config.timeout_seconds)
        self._stop = self._coordinator.stop
        self._loss_fn = loss_fn
        self._evaluate_fn = evaluate
        self._validation = {name: DatasetWithIds(each) for name, each in (validation or {}).items()}
        self._data_digests = dict(data_digests or {})
        self._hooks = hooks
        self._callbacks = tuple(callbacks)
        self._on_step_end = overriding(self._callbacks, "on_step_end")
        self._observer = observer

        self.plan = Plan(self.config, len(dataset), self._coordinator.world_size, self._coordinator.rank, seed)
        self.loop_state = LoopState(
            total_steps=self.plan.total_steps,
            steps_per_epoch=self.plan.steps_per_epoch,
            schedule=self.plan.learning_rate,
        )
        self._prepare(model, dataset)

        self._checkpointer: Checkpointer | None = None
        self._uncommitted: Path | None = None
        if run_dir is not None:
            identity = {**dict(result_values(self.config)), "seed": seed, "samples": len(dataset)}
            self._checkpointer = Checkpointer(
                Path(run_dir) / "checkpoints",
                self.accelerator,
                self._coordinator,
                self.checkpoint_config,
                config_hash=config_hash or hashlib.sha256(canonical_json(identity).encode()).hexdigest(),
                seed=seed,
                extra_files=extra_files,
                logs=logs,
                restart=restart,
                observer=observer,
            )

    def _prepare(self, model: nn.Module, dataset: Any) -> None:
        config, plan, device = self.config, self.plan, self.accelerator.device
        self._sampler = plan.sampler()
        self._dataset = DatasetWithIds(dataset)
        self._here = self._gathered_here(dataset)
        loader = build_loader(self._dataset, self._sampler, num_workers=config.num_workers, seed=self.seed)
        optimizer = build_optimizer(model, config, device)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, plan.lr_factor)
        self.model, self._optimizer, self._scheduler, self._loader = self.accelerator.prepare(
            model, optimizer, scheduler, loader
        )
        self._step = Step(
            self.accelerator,
            self.model,
            self._optimizer,
            self._scheduler,
            loss_fn=self._loss_fn,
            config=config,
            hooks=self._hooks,
        )
        self._ledger = Ledger(
            (config.log_interval + 1) * plan.accumulation,
            plan.accumulation,
            plan.world_size,
            self.accelerator.gather,
            device,
        )
        self._own_positions = plan.own_positions()
        self._position = 0

    # -- the run ---------------------------------------------------------------------------

    @property
    def unwrapped_model(self) -> nn.Module:
        """The model without Accelerate's and DDP's wrappers."""
        model: nn.Module = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        return model

    def fit(self) -> TrainingState:
        """Train to the end of the budget or until the evaluator stops, resuming from the run directory.

        Raises:
            Preempted: a stop signal; with a run directory the state has been saved.
            NonFinite: the loss or a gradient is not finite.
            LostPeer: another rank is gone.
            CheckpointError: no usable checkpoint although there are some.
        """
        signals = self._stop.installed() if self._handles_signals else nullcontext()
        with signals:
            try:
                with self.clock.timed("start"):
                    self._start()
                for callback in self._callbacks:
                    callback.on_train_start(self.loop_state)
                self._train()
                self._settle_commit()
                for callback in self._callbacks:
                    callback.on_train_end(self.loop_state)
            except (Preempted, NonFinite, PeerFailed):
                raise  # outcomes that all ranks share, or know of
            except LostPeer as error:
                raise self._coordinator.named(error) from error
            except Exception as error:
                if self.plan.world_size > 1 and is_lost_peer(error):
                    where = f"no answer in step {self.state.step + 1}"
                    lost = LostPeer(f"another rank is gone: {where} ({first_line(error)})")
                    # Now: the survivors call each other before any of them waits for its commit below.
                    raise self._coordinator.named(lost) from error
                self._coordinator.announce_failure(error)
                raise
            finally:
                if self._checkpointer is not None:
                    self._checkpointer.close()
                if self._hooks is not None:
                    self._hooks.close()
        return self.state

    def _start(self) -> None:
        """Warm DDP's buckets up, then load the newest checkpoint or seed a fresh start."""
        if self.accelerator.device.type == "cpu":
            keep_freed_memory()
        if self.plan.world_size > 1:
            batch = self._batch_of(0, 0)
            warm_up_buckets(self.model, lambda: self._step.throwaway_backward(batch))
        restored = self._checkpointer.load() if self._checkpointer is not None else None
        in_force, here = arithmetic(self.accelerator), machine(self.accelerator)
        if restored is None:
            self.state = TrainingState(arithmetic=in_force, machine=here, data=self._data_digests)
            # Dropout must differ between ranks; weights are already equal.
            set_seed(derive_rank_seed(self.seed, 0, self._coordinator.rank))
        else:
            self.state = restored
            self._note_resume(in_force, here)
        self.tokens_at_start = self.state.tokens_seen
        self.state.world_sizes.append(self.plan.world_size)
        self.loop_state.step, self.loop_state.epoch = self.state.step, self.state.epoch
        self.loop_state.skipped_steps = self.state.skipped_steps
        self._position = self.plan.first_position(self.state.epoch, self.state.step_in_epoch)

    def _note_resume(self, in_force: dict[str, str], here: dict[str, Any]) -> None:
        state = self.state
        for name, value in in_force.items():
            if state.arithmetic.get(name) != value:
                raise CheckpointError(
                    f"the checkpoint of step {state.step} was trained with {name} = {state.arithmetic.get(name)!r}, "
                    f"this launch has {value!r}; launch it as before, or start over with --fresh"
                )
        require_data(state.data, self._data_digests, state.step, "start over with --fresh")
        changes = {k: [state.machine.get(k), v] for k, v in here.items() if state.machine.get(k) != v}
        for name, (before, now) in changes.items():
            log.warning("resuming with %s = %r instead of %r: the bits may differ", name, now, before)
        world = self.plan.world_size
        state.resumes.append({"step": state.step, "world_size": world, "changes": changes})
        if world > state.machine.get("num_processes", world):
            log.warning("ranks that are new start with random states derived from seed, step and rank")
        state.machine = here
        log.info("resumed at step %d", state.step)

    def _batch_of(self, epoch: int, micro_step: int) -> Any:
        """This rank's slice of a micro-step's batch, on the device, outside the loader."""
        sampler = self.plan.sampler()
        sampler.seek(epoch, micro_step)
        _, batch = self._dataset.__getitems__(next(iter(sampler))[self._own_positions])
        return send_to_device(batch, self.accelerator.device)

    def _train(self) -> None:
        state = self.state
        self.model.train()
        self._step.record(lambda: self._batch_of(0, 0))
        self._rate_mark = (time.perf_counter() - self.clock.idle_of("training"), state.tokens_seen)
        if state.evaluation_due:
            self._evaluate_and_commit()
        while state.step < self.plan.total_steps and not state.stopped:
            with self.clock.timed("training"):
                self._run_epoch()
            if not state.stopped:
                self._evaluate_and_commit()

    def _run_epoch(self) -> None:
        """Steps up to the end of the epoch, of the budget, or until an evaluation stops training."""
        state = self.state
        self._sampler.seek(state.epoch, state.step_in_epoch * self.plan.accumulation)
        # Closed even when training ends in between: its workers then leave by themselves.
        with closing(self._batches()) as batches:
            for ids, batch in batches:
                if self._micro_step(ids, batch) and self._end_step():
                    break
        if state.step_in_epoch == self.plan.steps_per_epoch:
            state.epoch, state.step_in_epoch = state.epoch + 1, 0
            self.loop_state.epoch = state.epoch
        state.evaluation_due = not state.stopped

    def _batches(self) -> Generator[tuple[np.ndarray[Any, np.dtype[np.int64]], Any], None, None]:
        """This rank's slices of the epoch's micro-steps, on the device, with the ids of their samples."""
        if self._here is None:
            yield from self._loader
            return
        for ids in self._loader.batch_sampler:
            yield self._here.__getitems__(ids)

    def _gathered_here(self, dataset: Any) -> DatasetWithIds | None:
        """Where batches come from that need no DataLoader: nothing to move, nothing to overlap."""
        if self.accelerator.device.type == "cpu":
            return None if self.config.num_workers else self._dataset
        on_device = resident(dataset, self.accelerator.device)
        return None if on_device is None else DatasetWithIds(on_device)

    def _micro_step(self, ids: np.ndarray[Any, np.dtype[np.int64]], batch: Any) -> bool:
        """One forward and backward; returns whether it completed a step."""
        step, state, loop = self._step, self.state, self.loop_state
        loss = step.micro_step(batch)
        self._ledger.enter(loss, self._position + self._own_positions, ids)
        self._position += self.plan.micro_batch
        state.tokens_seen += count_tokens(batch) * self.plan.world_size
        if not step.is_complete:
            return False
        outcome = step.update(loss, state.step)
        loop._loss, loop._grad_norm = loss, step.grad_norm
        if outcome is Outcome.NOT_FINITE:
            raise self._stopped_here()
        if outcome is Outcome.SKIPPED:
            state.skipped_steps += 1
            loop.skipped_steps = state.skipped_steps
        return True

    def _end_step(self) -> bool:
        """Bookkeeping of a step; returns whether training ends inside this epoch."""
        state, config, loop = self.state, self.config, self.loop_state
        state.step += 1
        state.step_in_epoch += 1
        loop.step = state.step
        self._observer.reached(STEP_DONE)
        for call in self._on_step_end:
            call(loop)
        if state.step % config.log_interval == 0:
            self._log()
        if state.step_in_epoch == self.plan.steps_per_epoch or state.step == self.plan.total_steps:
            return state.step == self.plan.total_steps
        if config.eval_interval is not None and state.step % config.eval_interval == 0:
            state.evaluation_due = True
            self._evaluate_and_commit()
            if state.stopped:
                return True
        every = self.checkpoint_config.every_steps
        if every is not None and state.step % every == 0:
            self._commit()
        if self._coordinator.poll(self._background_failure):
            self._preempt()
        return False

    # -- evaluation, checkpoints, stopping -------------------------------------------------

    def _evaluate_and_commit(self) -> None:
        """The evaluation that is due, its verdict to all ranks, the checkpoint, the callbacks."""
        state, loop, interval = self.state, self.loop_state, self.config.eval_interval
        self._flush()
        if self._coordinator.drain():
            self._preempt()
        is_last = state.step == self.plan.total_steps
        epoch_ended = state.step_in_epoch == 0 or is_last
        done = bool(state.evaluations) and state.evaluations[-1]["step"] == state.step
        wanted = interval is None or state.step % interval == 0 or is_last
        if (self._evaluate_fn is not None or self._validation) and wanted and not done:
            verdict = self._judge()
            evaluation = {"step": state.step, "epoch": self.plan.epoch_of(state.step), **verdict}
            state.evaluations.append({name: value for name, value in evaluation.items() if name != "samples"})
            state.stopped = bool(verdict.get("stop"))
            if verdict.get("passed") and state.keep_step is None:
                state.keep_step = state.step
            for callback in self._callbacks:
                callback.on_evaluate(loop, evaluation)
        state.evaluation_due = False
        if epoch_ended or state.stopped or state.step in {state.keep_step, state.best_step}:
            self._commit()
        if epoch_ended:
            for callback in self._callbacks:
                callback.on_epoch_end(loop)

    def _judge(self) -> dict[str, Any]:
        """Losses on the validation datasets, by all ranks; then the evaluator's verdict, if there is one."""
        state = self.state
        self.loop_state.losses = {}
        if self._validation:
            with self.clock.timed("evaluation"):
                self.loop_state.losses = {name: self._mean_loss(each) for name, each in self._validation.items()}
            best = self.loop_state.losses.get("val", math.inf)
            if best < (math.inf if state.best_loss is None else state.best_loss):
                state.best_step, state.best_loss = state.step, best
        verdict = self._run_evaluator() if self._evaluate_fn is not None else {}
        losses = {f"{name}_loss": loss for name, loss in self.loop_state.losses.items()}
        return {**verdict, "metrics": {**losses, **verdict.get("metrics", {})}} if losses else verdict

    def _mean_loss(self, dataset: DatasetWithIds) -> float:
        plan = self.plan

        def leave_if_asked() -> None:
            if self._coordinator.poll(self._background_failure):
                self._preempt()

        def gather(sums: Any) -> list[Any]:
            if self._coordinator.drain():
                self._preempt()
            return self._coordinator.gather("validation loss", sums)

        share = Share(plan.rank, plan.world_size, plan.micro_batch, leave_if_asked, gather)
        return mean_loss(self.model, dataset, self._loss_fn, self.accelerator.device, share)

    @property
    def _background_failure(self) -> BaseException | None:
        return self._checkpointer.failure if self._checkpointer is not None else None

    def _run_evaluator(self) -> dict[str, Any]:
        assert self._evaluate_fn is not None
        evaluate, model = self._evaluate_fn, self.unwrapped_model

        def judge(should_stop: Callable[[], bool]) -> dict[str, Any]:
            self._observer.reached(EVALUATION_BEGUN)
            # On the main process alone: what it drew here would set its dropout apart from an undisturbed run's.
            with preserved_random_state(self.accelerator.device):
                verdict = evaluate(model, self.loop_state, should_stop)
            if not isinstance(verdict, dict):
                raise TypeError(f"evaluate() must return a dictionary of JSON values, not {type(verdict).__name__}")
            return verdict

        with self.clock.timed("evaluation"):
            try:
                verdict = self._coordinator.main_phase("evaluation", judge)
            except Interrupted:
                self._preempt()
        self.model.train()
        return dict(verdict)

    def _commit(self) -> None:
        self._flush()
        if self._checkpointer is None:
            return
        with self.clock.timed("checkpoint"):
            path = self._checkpointer.save(self.state)
        if path != self._uncommitted:
            # To save, the checkpointer waited for the one before.
            self._report_commit()
            self._uncommitted = path

    def _settle_commit(self) -> None:
        """Wait for the save in flight; on every rank."""
        if self._checkpointer is not None:
            with self.clock.timed("checkpoint"):
                self._checkpointer.wait()
            self._report_commit()

    def _report_commit(self) -> None:
        path, self._uncommitted = self._uncommitted, None
        if path is None:
            return
        for callback in self._callbacks:
            callback.on_checkpoint(self.loop_state, path)

    def _preempt(self) -> None:
        self._commit()
        self._settle_commit()
        raise Preempted(self.state.step, self._stop.signal_name or "a signal to another rank")

    # -- losses and logs -------------------------------------------------------------------

    def _flush(self) -> None:
        """Bring the losses and the fingerprint of all ranks to the host: the loop's only sync.

        Raises:
            NonFinite: on all ranks, when a loss is not finite or an update was skipped.
        """
        losses, fingerprint = self._ledger.settle()
        first = len(self.state.train_loss)
        self.state.train_loss.extend(losses)
        self.state.fingerprint = (self.state.fingerprint + fingerprint) % 2**64
        good = next((i for i, loss in enumerate(losses) if not math.isfinite(loss)), len(losses))
        made = self._step.updates_made()
        good = good if made is None else min(good, made)
        if good < len(losses):
            raise self._stopped_at(first + good)

    def _log(self) -> None:
        self._flush()
        state, loop = self.state, self.loop_state
        line = {
            "step": state.step,
            "epoch": self.plan.epoch_of(state.step),
            "loss": float(np.mean(state.train_loss[-self.config.log_interval :])),
            "lr": loop.lr,
            "grad_norm": loop.grad_norm,
            "tokens_seen": state.tokens_seen,
            "tokens_per_second": self._tokens_per_second(),
        }
        if self._hooks:
            line.update(self._hooks.scalars())
        for callback in self._callbacks:
            callback.on_log(loop, line)

    def _tokens_per_second(self) -> float:
        """Since the last call, time in other phases than training left out."""
        now = time.perf_counter() - self.clock.idle_of("training")
        before, tokens = self._rate_mark
        self._rate_mark = (now, self.state.tokens_seen)
        return (self.state.tokens_seen - tokens) / max(now - before, 1e-9)

    def _stopped_here(self) -> NonFinite:
        """As :meth:`_stopped_at`, for the step in progress; a collective."""
        losses, _ = self._ledger.settle()
        self.state.train_loss.extend(losses)
        return self._stopped_at(self.state.step)

    def _stopped_at(self, step: int) -> NonFinite:
        """Update ``step`` (0-based) could not be made: replay its batch on every rank and name what is not finite."""
        # Losses from there on belong to no update: they were computed from weights that stood still.
        del self.state.train_loss[step:]
        self.state.step = step
        epoch, within = divmod(step, self.plan.steps_per_epoch)
        finding: str | None = None
        for micro_step in range(self.plan.accumulation):
            batch = self._batch_of(epoch, within * self.plan.accumulation + micro_step)
            finding = finding or first_bad_tensor(self.unwrapped_model, batch, self._loss_fn)
        findings = self._coordinator.gather("diagnosis of a non-finite loss", finding)
        rank, first = next(((r, f) for r, f in enumerate(findings) if f), (0, None))
        where = f"{first} on rank {rank}" if first else "nothing non-finite in a replay of its batch"
        return NonFinite(step + 1, where)
