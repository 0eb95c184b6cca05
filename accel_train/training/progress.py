"""What a person sees of a run: phase lines, one bar per epoch, one summary line per epoch.

On a terminal the bar lives on stderr; elsewhere there is no bar but one line per log interval,
so that a log file stays readable. Only the main process makes one of these.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm import tqdm

from accel_train.training.callbacks import Callback, LoopState

_SUMMARY_FIGURES = ("edge_compliance", "rule_compliance", "sampled_rule_compliance", "val_loss")


def say(phase: str, what: str) -> None:
    """One line of progress: the phase, then what happened."""
    tqdm.write(f"{phase:<10} {what}", file=sys.stdout)
    sys.stdout.flush()


def be_silent(_phase: str, _what: str) -> None:
    """:func:`say` for the other ranks."""


class Progress(Callback):
    """Bars, log lines and epoch summaries.

    Args:
        max_epochs: for the headings.
        bars: draw bars; default: when stderr is a terminal.
    """

    def __init__(self, max_epochs: int, *, bars: bool | None = None) -> None:
        self._max_epochs = max_epochs
        self._bars = sys.stderr.isatty() if bars is None else bars
        self._bar: tqdm[Any] | None = None
        self._last: dict[str, Any] = {}
        self._evaluation: dict[str, Any] = {}
        self._started = time.perf_counter()

    def on_train_start(self, state: LoopState) -> None:
        """Say where training starts, and open the first bar."""
        if state.step:
            say("training", f"resumed at step {state.step} of {state.total_steps} (epoch {state.epoch + 1})")
        else:
            say("training", f"{state.total_steps} steps at most, {state.steps_per_epoch} an epoch")
        self._open_bar(state, state.step // state.steps_per_epoch, state.step % state.steps_per_epoch)

    def on_log(self, state: LoopState, line: dict[str, Any]) -> None:
        """Move the bar, or print one line."""
        self._last = line
        if self._bars:
            if self._bar is None:
                self._open_bar(state, self._epoch_of(state) - 1, 0)
            assert self._bar is not None
            self._bar.set_postfix_str(f"loss {line['loss']:.4f}, lr {line['lr']:.2e}", refresh=False)
            self._bar.update(self._done_in_epoch(state) - self._bar.n)
        else:
            say(
                "training",
                f"step {line['step']} epoch {self._epoch_of(state)} loss {line['loss']:.4f} lr {line['lr']:.2e} "
                f"grad_norm {line['grad_norm']:.3f} {line['tokens_per_second']:.0f} tokens/s",
            )

    def on_evaluate(self, state: LoopState, evaluation: dict[str, Any]) -> None:
        """Keep the figures for the summary line."""
        self._evaluation = evaluation

    def on_epoch_end(self, state: LoopState) -> None:
        """Close the bar and print the epoch's summary."""
        self._close_bar(state)
        metrics = self._evaluation.get("metrics", {})
        figures = [f"{k} {metrics[k]:.4f}" for k in _SUMMARY_FIGURES if metrics.get(k) is not None]
        if "passed" in self._evaluation:
            reason = self._evaluation.get("failure_reason")
            figures.append("gate passed" if self._evaluation["passed"] else f"gate not passed ({reason})")
        loss = f"loss {self._last.get('loss', state.loss):.4f}"
        elapsed = time.perf_counter() - self._started
        epoch = f"{self._epoch_of(state)}/{self._max_epochs}"
        say("epoch", ", ".join([f"{epoch}: step {state.step}", loss, *figures, f"{elapsed:.1f} s"]))

    def on_train_end(self, state: LoopState) -> None:
        """Close what is open."""
        self.close()

    def close(self) -> None:
        """Close the bar; safe to call at any time."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _epoch_of(self, state: LoopState) -> int:
        """The 1-based epoch of the last step."""
        return -(-state.step // state.steps_per_epoch)

    def _done_in_epoch(self, state: LoopState) -> int:
        return state.step - (self._epoch_of(state) - 1) * state.steps_per_epoch

    def _open_bar(self, state: LoopState, epoch: int, done: int) -> None:
        if not self._bars:
            return
        self._bar = tqdm(
            desc=f"epoch {epoch + 1}/{self._max_epochs}",
            total=min(state.steps_per_epoch, state.total_steps - epoch * state.steps_per_epoch),
            initial=done,
            unit="step",
            leave=False,
            file=sys.stderr,
            dynamic_ncols=True,
        )

    def _close_bar(self, state: LoopState) -> None:
        if self._bar is not None:
            self._bar.update(self._done_in_epoch(state) - self._bar.n)
            self._bar.close()
            self._bar = None
