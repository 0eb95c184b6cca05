"""The loop: forward, loss, backward, clip, optimizer, scheduler, zero_grad, and nothing in between.

:meth:`Trainer._run_epoch` is the loop, and :mod:`accel_train.training.step` is what it does with a batch. Between
two log boundaries the host never waits for the device: losses go into a buffer on the device, the order of the data
is a pure function of (seed, epoch, step), and the agreement to stop is read one step late. What may differ between
ranks (a signal, a NaN, the verdict of an evaluation, the choice of a checkpoint) is agreed by all before one acts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from accelerate import Accelerator, utils
from torch import nn

from accel_train.checkpoints.checkpointer import Checkpointer
from accel_train.checkpoints.random_states import derive_rank_seed
from accel_train.checkpoints.state import TrainingState
from accel_train.config.fields import result_values
from accel_train.config.sections import CheckpointConfig, TrainingConfig
from accel_train.data.loader import count_tokens
from accel_train.errors import Interrupted, LostPeer, NonFinite, PeerFailed, Preempted
from accel_train.files.atomic import sha256_json
from accel_train.process.fault_points import STEP_DONE
from accel_train.process.malloc import keep_freed_memory
from accel_train.process.signals import StopSignal
from accel_train.process.stopwatch import Rate, Stopwatch
from accel_train.ranks.accelerator import arithmetic, build_accelerator, check_accelerator, machine, warm_up_buckets
from accel_train.ranks.coordinator import Coordinator
from accel_train.ranks.store import first_line, is_lost_peer
from accel_train.training.batches import Batches
from accel_train.training.callbacks import Callback, LoopState, overriding
from accel_train.training.commits import Commits, note_resume
from accel_train.training.evaluation import Evaluation, Evaluator
from accel_train.training.hooks import Hooks
from accel_train.training.loss_buffer import LossBuffer
from accel_train.training.losses import LossFunction, next_token_cross_entropy
from accel_train.training.non_finite import replay
from accel_train.training.plan import Plan
from accel_train.training.services import Services
from accel_train.training.step import Outcome, Step, build_optimizer


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
        accelerator: as :func:`build_accelerator` returns it; default: built here.
        services: what only the command line passes; without a coordinator among them ``fit`` handles the stop
            signals itself when there is a run directory.

    Raises:
        ConfigError: the dataset is smaller than one batch, or the batch cannot be split.
    """

    def __init__(
        self,
        model: nn.Module,
        dataset: Any,
        config: TrainingConfig | None = None,
        *,
        run_dir: str | Path | None = None,
        loss_fn: LossFunction = next_token_cross_entropy,
        evaluate: Evaluator | None = None,
        validation: Mapping[str, Any] | None = None,
        callbacks: Sequence[Callback] = (),
        hooks: Hooks | None = None,
        seed: int = 42,
        checkpoint: CheckpointConfig | None = None,
        accelerator: Accelerator | None = None,
        services: Services | None = None,
    ) -> None:
        self.config = config = config or TrainingConfig()
        self.checkpoint_config = checkpoint or CheckpointConfig()
        self.seed = seed
        self.accelerator = accelerator or build_accelerator(config)
        check_accelerator(self.accelerator, config)
        self.state, self.clock, self.tokens_at_start = TrainingState(), Stopwatch(), 0
        self._services = services = services or Services()
        self._handles_signals = services.coordinator is None and run_dir is not None
        self._coordinator = coordinator = services.coordinator or Coordinator(StopSignal(), config.timeout_seconds)
        self._loss_fn, self._hooks, self._callbacks = loss_fn, hooks or Hooks(model, {}, {}), tuple(callbacks)
        self._on_step_end = overriding(self._callbacks, "on_step_end")
        self.plan = plan = Plan(config, len(dataset), coordinator.world_size, coordinator.rank, seed)
        self.loop_state = LoopState(
            total_steps=plan.total_steps, steps_per_epoch=plan.steps_per_epoch, schedule=plan.learning_rate
        )
        device = self.accelerator.device
        self._evaluation = Evaluation(evaluate, validation or {}, loss_fn, plan, device, coordinator, services.reached)
        self._batches = batches = Batches(dataset, plan, device)
        optimizer = build_optimizer(model, config, device)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, plan.lr_factor)
        prepared = self.accelerator.prepare(model, optimizer, scheduler, batches.loader)
        self.model, self._optimizer, self._scheduler, batches.loader = prepared
        self._step = Step(self.accelerator, *prepared[:3], loss_fn=loss_fn, config=config, hooks=self._hooks)
        capacity = (config.log_interval + 1) * plan.accumulation
        self._losses = LossBuffer(capacity, plan.accumulation, plan.world_size, self._gather, device)
        checkpointer: Checkpointer | None = None
        if run_dir is not None:
            identity = {**result_values(config), "seed": seed, "samples": len(dataset)}
            checkpointer = Checkpointer(
                Path(run_dir) / "checkpoints",
                self.accelerator,
                coordinator,
                self.checkpoint_config,
                config_hash=services.config_hash or sha256_json(identity),
                seed=seed,
                extra_files=services.extra_files,
                logs=services.logs,
                restart=services.restart,
                reached=services.reached,
            )
        self._commits = Commits(checkpointer, self._callbacks, self.loop_state, self.clock)

    # -- the run ---------------------------------------------------------------------------

    @property
    def unwrapped_model(self) -> nn.Module:
        """The model without Accelerate's and DDP's wrappers."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)  # type: ignore[no-any-return]

    def fit(self) -> TrainingState:
        """Train to the end of the budget or until the evaluator stops, resuming from the run directory.

        Raises:
            Preempted: a stop signal; with a run directory the state has been saved.
            NonFinite: the loss or a gradient is not finite.
            LostPeer: another rank is gone.
            CheckpointError: no usable checkpoint although there are some.
        """
        with self._coordinator.stop.installed() if self._handles_signals else nullcontext():
            try:
                with self.clock.timed("start"):
                    self._start()
                for callback in self._callbacks:
                    callback.on_train_start(self.loop_state)
                self._train()
                self._commits.settle()
                for callback in self._callbacks:
                    callback.on_train_end(self.loop_state)
            except (Preempted, NonFinite, PeerFailed):
                raise  # outcomes that all ranks share, or know of
            except LostPeer as error:
                raise self._coordinator.named(error) from error
            except Exception as error:
                if self.plan.world_size == 1 or not is_lost_peer(error):
                    self._coordinator.announce_failure(error)
                    raise
                lost = LostPeer(f"another rank is gone: no answer in step {self.state.step + 1} ({first_line(error)})")
                # Now: the survivors call each other before any of them waits for its commit below.
                raise self._coordinator.named(lost) from error
            finally:
                self._commits.close()
                self._hooks.close()
        return self.state

    def _start(self) -> None:
        """Warm DDP's buckets up, then load the newest checkpoint or seed a fresh start."""
        if self.accelerator.device.type == "cpu":
            keep_freed_memory()
        if self.plan.world_size > 1:
            batch = self._batches.one(0, 0)
            warm_up_buckets(self.model, lambda: self._step.throwaway_backward(batch))
        in_force, here, data = arithmetic(self.accelerator), machine(self.accelerator), self._services.data_digests
        restored = self._commits.load()
        self.state = restored or TrainingState(arithmetic=in_force, machine=here, data=dict(data))
        if restored is None:
            # Dropout must differ between ranks; weights are already equal.
            utils.set_seed(derive_rank_seed(self.seed, 0, self._coordinator.rank))
        else:
            note_resume(restored, in_force, here, data)
        self.tokens_at_start = self.state.tokens_seen
        self.state.world_sizes.append(self.plan.world_size)
        self.loop_state.step, self.loop_state.epoch = self.state.step, self.state.epoch
        self.loop_state.skipped_steps = self.state.skipped_steps

    def _train(self) -> None:
        state = self.state
        self.model.train()
        self._step.record(lambda: self._batches.one(0, 0))
        self._rate = Rate(self.clock, "training", state.tokens_seen)
        if state.evaluation_due:
            self._evaluate_and_commit()
        while state.step < self.plan.total_steps and not state.stopped:
            with self.clock.timed("training"):
                self._run_epoch()
            if not state.stopped:
                self._evaluate_and_commit()

    def _run_epoch(self) -> None:
        """Train to the end of the epoch or of the budget, or until an evaluation stops training."""
        step, state, loop, plan = self._step, self.state, self.loop_state, self.plan
        position = plan.first_position(state.epoch, state.step_in_epoch)
        first = state.step_in_epoch * plan.accumulation
        # Closed even when training ends in between: its workers then leave by themselves.
        with closing(self._batches.of_epoch(state.epoch, first)) as batches:
            for ids, batch in batches:
                loss = step.micro_step(batch)
                self._losses.add(loss, position + self._batches.own_positions, ids)
                position += plan.micro_batch
                state.tokens_seen += count_tokens(batch) * plan.world_size
                if not step.is_complete:
                    continue
                outcome = step.update(loss, state.step)
                loop.observe(loss, step.grad_norm)
                if outcome is Outcome.NOT_FINITE:
                    state.train_loss += self._losses.collect()[0]
                    raise self._stopped_at(state.step)
                if outcome is Outcome.SKIPPED:
                    state.skipped_steps += 1
                if self._end_step():
                    break
        if state.step_in_epoch == plan.steps_per_epoch:
            state.epoch, state.step_in_epoch = state.epoch + 1, 0
            loop.epoch = state.epoch
        state.evaluation_due = not state.stopped

    def _end_step(self) -> bool:
        """Count a step, then log, evaluate, save or leave where that is due; return whether the epoch ends early."""
        state, config, loop = self.state, self.config, self.loop_state
        state.step += 1
        state.step_in_epoch += 1
        loop.step, loop.skipped_steps = state.step, state.skipped_steps
        self._services.reached(STEP_DONE)
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
        if self._asked_to_stop():
            self._preempt()
        return False

    # -- evaluation, checkpoints, stopping -------------------------------------------------

    def _evaluate_and_commit(self) -> None:
        """Evaluate where that is due, tell the callbacks, and save a checkpoint."""
        state, loop, interval = self.state, self.loop_state, self.config.eval_interval
        self._flush()
        if self._coordinator.drain():
            self._preempt()
        is_last = state.step == self.plan.total_steps
        epoch_ended = state.step_in_epoch == 0 or is_last
        done = bool(state.evaluations) and state.evaluations[-1]["step"] == state.step
        wanted = interval is None or state.step % interval == 0 or is_last
        if self._evaluation and wanted and not done:
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
        """Return the evaluator's verdict, with the losses on the validation datasets among its metrics."""
        state, loop = self.state, self.loop_state
        with self.clock.timed("evaluation"):
            try:
                loop.losses = self._evaluation.losses(self.model, self._asked_to_stop)
                best = loop.losses.get("val", math.inf)
                if best < (math.inf if state.best_loss is None else state.best_loss):
                    state.best_step, state.best_loss = state.step, best
                verdict = self._evaluation.verdict(self.unwrapped_model, loop)
            except Interrupted:
                self._preempt()
        self.model.train()
        losses = {f"{name}_loss": loss for name, loss in loop.losses.items()}
        return {**verdict, "metrics": {**losses, **verdict.get("metrics", {})}} if losses else verdict

    def _asked_to_stop(self) -> bool:
        return self._coordinator.poll(self._commits.failure)

    def _commit(self) -> None:
        self._flush()
        self._commits.save(self.state)

    def _preempt(self) -> NoReturn:
        self._commit()
        self._commits.settle()
        raise Preempted(self.state.step, self._coordinator.stop.signal_name or "a signal to another rank")

    # -- losses and logs -------------------------------------------------------------------

    def _gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Concatenate a tensor over the ranks, in rank order; returns when it is there to be read."""
        gathered: torch.Tensor = self.accelerator.gather(tensor)
        if gathered.device.type == "cuda":
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            self._coordinator.wait_for_device(f"step {self.state.step}", event.query)
        return gathered

    def _flush(self) -> None:
        """Bring the losses and the fingerprint of all ranks to the host: only here the loop waits for the device.

        Raises:
            NonFinite: on all ranks, when a loss is not finite or an update was skipped.
        """
        if self.plan.world_size > 1:
            # The device waits for the other ranks, on a GPU for ever if one is gone: that is known after this.
            self._coordinator.poll(self._commits.failure)
        losses, fingerprint = self._losses.collect()
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
            "tokens_per_second": self._rate.since_last(state.tokens_seen),
            **self._hooks.scalars(),
        }
        for callback in self._callbacks:
            callback.on_log(loop, line)

    def _stopped_at(self, step: int) -> NonFinite:
        """Return the error of update ``step`` (0-based), which a replay on every rank explains; a collective."""
        # Losses from there on belong to no update: they were computed from weights that stood still.
        del self.state.train_loss[step:]
        self.state.step = step
        epoch, within = divmod(step, self.plan.steps_per_epoch)
        first = within * self.plan.accumulation
        batches = (self._batches.one(epoch, first + number) for number in range(self.plan.accumulation))
        return replay(step + 1, self.unwrapped_model, batches, self._loss_fn, self._coordinator)
