"""What a person sees of a run: phase lines, one bar per epoch, one summary line per epoch.

On a terminal the bar lives on stderr; elsewhere there is no bar but one line per log interval,
so that a log file stays readable. Only the main process shows one of these.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

from accel_train.process.console import say
from accel_train.training.callbacks import Callback, LoopState


class Progress(Callback):
    """Bars, log lines and epoch summaries.

    Args:
        headline: metrics of the line that ends an epoch, with their short names.
        bars: draw bars; default: when stderr is a terminal.
    """

    def __init__(self, headline: Mapping[str, str] | None = None, *, bars: bool | None = None) -> None:
        self._headline = dict(headline or {})
        self._bars = sys.stderr.isatty() if bars is None else bars
        self._bar: tqdm[Any] | None = None
        self._last: dict[str, Any] = {}
        self._evaluation: dict[str, Any] = {}
        self._epoch_began = time.perf_counter()

    def on_train_start(self, state: LoopState) -> None:
        """Say where training starts."""
        budget = f"{state.total_steps} steps at most, {state.steps_per_epoch} an epoch"
        say("training", f"resumed after step {state.step}; {budget}" if state.step else budget)
        self._epoch_began = time.perf_counter()

    def on_step_end(self, state: LoopState) -> None:
        """Move the bar; no tensor is read."""
        if self._bars:
            if self._bar is None:
                self._bar = self._open_bar(state)
            self._bar.update()
            if self._bar.n == self._bar.total:  # it stays on the screen during the evaluation
                self._bar.refresh()

    def on_log(self, state: LoopState, line: dict[str, Any]) -> None:
        """Loss and learning rate to the bar, or one line."""
        self._last = line
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {line['loss']:.4f}, lr {line['lr']:.2e}", refresh=False)
        elif not self._bars:
            rates = f"grad norm {line['grad_norm']:.3f}  {line['tokens_per_second']:,.0f} tokens/s"
            say("training", f"epoch {_place(state)}  loss {line['loss']:.4f}  lr {line['lr']:.2e}  {rates}")

    def on_evaluate(self, state: LoopState, evaluation: dict[str, Any]) -> None:
        """Keep the figures for the summary line."""
        self._evaluation = evaluation

    def on_epoch_end(self, state: LoopState) -> None:
        """Close the bar and print the epoch's summary."""
        self.close()
        loss = self._last.get("loss", state.loss)
        now = time.perf_counter()
        parts = [_place(state), f"loss {loss:.4f}", *_verdict(self._evaluation, self._headline)]
        say("epoch", "  ".join([*parts, f"{now - self._epoch_began:.1f} s"]))
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
        before = (state.step - 1) // state.steps_per_epoch * state.steps_per_epoch
        total, done = min(state.steps_per_epoch, state.total_steps - before), state.step - 1 - before
        shown = f"epoch {_epoch(state)}"
        return tqdm(desc=shown, total=total, initial=done, unit="step", leave=False, dynamic_ncols=True)


def _epoch(state: LoopState) -> str:
    """Return the epoch of the last step, such as ``2/50``."""
    last = -(-state.total_steps // state.steps_per_epoch)
    return f"{-(-state.step // state.steps_per_epoch):>{len(str(last))}}/{last}"


def _place(state: LoopState) -> str:
    """Return epoch and step, equally wide in every line of a run."""
    return f"{_epoch(state)}  step {state.step:>{len(str(state.total_steps))}}/{state.total_steps}"


def _verdict(evaluation: dict[str, Any], headline: Mapping[str, str]) -> list[str]:
    """Figures and outcome of an evaluation; the reason only where the figures do not show it."""
    metrics = evaluation.get("metrics", {})
    parts = [f"{shown} {metrics[name]:.4f}" for name, shown in headline.items() if metrics.get(name) is not None]
    if evaluation.get("passed"):
        parts.append("gate passed")
    elif "passed" in evaluation:
        unexplained = all(criterion["passed"] for criterion in evaluation.get("criteria", []))
        parts.append(f"gate not passed: {evaluation['failure_reason']}" if unexplained else "gate not passed")
    return parts
