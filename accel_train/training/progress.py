"""What a person sees of a run: phase lines, one bar per epoch, one summary line per epoch.

On a terminal the bar lives on stderr; elsewhere there is no bar but one line per log interval,
so that a log file stays readable. Only the main process makes one of these.
"""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

from tqdm import tqdm

from accel_train.training.callbacks import Callback, LoopState

_SUMMARY_FIGURES = {
    "edge_compliance": "edge",
    "rule_compliance": "rule",
    "sampled_rule_compliance": "sampled rule",
    "val_loss": "validation loss",
}


def say(phase: str, what: str) -> None:
    """One line of progress: the phase, then what happened."""
    tqdm.write(f"{phase:<10} {what}", file=sys.stdout)
    sys.stdout.flush()


def be_silent(_phase: str, _what: str) -> None:
    """:func:`say` for the other ranks."""


class ConsoleHandler(logging.Handler):
    """Log messages on stderr, in the form of the command line's own errors; a bar is not torn by them."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one message, with its traceback if it has one."""
        tqdm.write(f"accel-train: {record.levelname.lower()}: {self.format(record)}", file=sys.stderr)


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
        self._epoch_began = time.perf_counter()

    def on_train_start(self, state: LoopState) -> None:
        """Say where training starts."""
        epochs = min(self._max_epochs, -(-state.total_steps // state.steps_per_epoch))
        budget = f"{state.total_steps} steps, {state.steps_per_epoch} an epoch, {_count(epochs, 'epoch')} at most"
        say("training", f"resumed after step {state.step} of {budget}" if state.step else budget)
        self._epoch_began = time.perf_counter()

    def on_step_end(self, state: LoopState) -> None:
        """Move the bar; no tensor is read."""
        if self._bars:
            if self._bar is None:
                self._bar = self._open_bar(state)
            self._bar.update()

    def on_log(self, state: LoopState, line: dict[str, Any]) -> None:
        """Loss and learning rate to the bar, or one line."""
        self._last = line
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {line['loss']:.4f}, lr {line['lr']:.2e}")
        elif not self._bars:
            width = len(str(state.total_steps))
            say(
                "training",
                f"epoch {_epoch(state)}/{self._max_epochs}  step {line['step']:>{width}}/{state.total_steps}  "
                f"loss {line['loss']:.4f}  lr {line['lr']:.2e}  grad norm {line['grad_norm']:.3f}  "
                f"{line['tokens_per_second']:,.0f} tokens/s",
            )

    def on_evaluate(self, state: LoopState, evaluation: dict[str, Any]) -> None:
        """Keep the figures for the summary line."""
        self._evaluation = evaluation

    def on_epoch_end(self, state: LoopState) -> None:
        """Close the bar and print the epoch's summary."""
        self.close()
        loss = self._last.get("loss", state.loss)
        now = time.perf_counter()
        parts = [
            f"{_epoch(state)}/{self._max_epochs}",
            f"step {state.step:>{len(str(state.total_steps))}}",
            f"loss {loss:.4f}",
            *_verdict(self._evaluation),
            f"{now - self._epoch_began:.1f} s",
        ]
        say("epoch", "  ".join(parts))
        self._last, self._evaluation, self._epoch_began = {}, {}, now

    def on_train_end(self, state: LoopState) -> None:
        """Close what is open."""
        self.close()

    def close(self) -> None:
        """Close the bar; safe to call at any time."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _open_bar(self, state: LoopState) -> tqdm[Any]:
        """The bar of the epoch that the last step belongs to, as it stood before that step."""
        epoch = _epoch(state)
        before = (epoch - 1) * state.steps_per_epoch
        return tqdm(
            desc=f"epoch {epoch}/{self._max_epochs}",
            total=min(state.steps_per_epoch, state.total_steps - before),
            initial=state.step - 1 - before,
            unit="step",
            leave=False,
            file=sys.stderr,
            dynamic_ncols=True,
        )


def _epoch(state: LoopState) -> int:
    """The 1-based epoch of the last step."""
    return -(-state.step // state.steps_per_epoch)


def _verdict(evaluation: dict[str, Any]) -> list[str]:
    """Figures and outcome of an evaluation; the reason only where the figures do not show it."""
    metrics = evaluation.get("metrics", {})
    parts = [f"{shown} {metrics[name]:.4f}" for name, shown in _SUMMARY_FIGURES.items() if metrics.get(name) is not None]
    if evaluation.get("passed"):
        parts.append("gate passed")
    elif "passed" in evaluation:
        reasons = str(evaluation.get("failure_reason")).split("; ")
        unmet = [c["metric"] for c in evaluation.get("criteria", []) if not c["passed"]]
        hidden = [reason for reason in reasons if not any(reason.startswith(metric) for metric in unmet)]
        parts.append(f"gate not passed ({'; '.join(hidden)})" if hidden else "gate not passed")
    return parts


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
