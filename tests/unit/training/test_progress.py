"""Bars and lines: what they say about where a run stands."""

from __future__ import annotations

import pytest

from accel_train.training.callbacks import LoopState
from accel_train.training.progress import Progress


class Loop:
    """Drives the callbacks as the trainer does: five steps an epoch, twelve in all, a log line every two."""

    def __init__(self, progress: Progress, step: int = 0) -> None:
        self.progress = progress
        self.state = LoopState(step=step, total_steps=12, steps_per_epoch=5)
        progress.on_train_start(self.state)

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.state.step += 1
            self.progress.on_step_end(self.state)
            if self.state.step % 2 == 0:
                line = {"step": self.state.step, "loss": self.state.step / 10, "lr": 0.001, "grad_norm": 1.0}
                self.progress.on_log(self.state, {**line, "tokens_per_second": 1234.5})

    def end_epoch(self, **evaluation) -> None:
        if evaluation:
            self.progress.on_evaluate(self.state, evaluation)
        self.progress.on_epoch_end(self.state)


def test_lines_are_aligned_and_say_how_far_it_is(capsys):
    loop = Loop(
        Progress(
            {
                "edge_compliance": "edge",
                "rule_compliance": "rule",
                "sampled_rule_compliance": "sampled rule",
                "val_loss": "validation loss",
                "val_bits_per_byte": "bits per byte",
            },
            bars=False,
        )
    )
    loop.steps(12)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "training   12 steps at most, 5 an epoch"
    assert lines[1] == "training   epoch 1/3  step  2/12  loss 0.2000  lr 1.00e-03  grad norm 1.000  1,234 tokens/s"
    assert lines[-1] == "training   epoch 3/3  step 12/12  loss 1.2000  lr 1.00e-03  grad norm 1.000  1,234 tokens/s"


def test_a_resumed_run_says_from_where_and_its_bar_goes_on_there(capsys):
    loop = Loop(Progress(bars=True), step=7)
    loop.steps(1)
    loop.progress.close()
    shown = capsys.readouterr()
    assert shown.out == "training   resumed after step 7; 12 steps at most, 5 an epoch\n"
    assert "epoch 2/3:" in shown.err
    assert "2/5" in shown.err, "the bar begins where the epoch stood"


def test_an_evaluation_that_was_due_at_the_resume_draws_no_bar(capsys):
    loop = Loop(Progress(bars=True), step=5)
    loop.end_epoch(passed=True, criteria=[], failure_reason=None)
    shown = capsys.readouterr()
    assert shown.err == ""
    assert "epoch      1/3  step  5/12" in shown.out


def test_a_full_bar_shows_the_newest_loss(capsys):
    loop = Loop(Progress(bars=True))
    loop.steps(5)
    drawn = capsys.readouterr().err.split("\r")
    assert "100%" in drawn[-1]
    assert "loss 0.4000, lr 1.00e-03" in drawn[-1]


def test_the_last_epoch_may_be_shorter(capsys):
    loop = Loop(Progress(bars=True), step=10)
    loop.steps(2)
    assert "2/2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("evaluation", "verdict"),
    [
        ({}, ""),
        ({"metrics": {"val_loss": 1.5}}, "validation loss 1.5000  "),
        ({"passed": True, "criteria": [], "metrics": {"edge_compliance": 1.0}}, "edge 1.0000  gate passed  "),
        (
            {
                "passed": False,
                "criteria": [{"metric": "edge_compliance", "passed": False}],
                "metrics": {"edge_compliance": 0.5, "rule_compliance": None},
                "failure_reason": "edge_compliance is 0.5000, needs > 0.95",
            },
            "edge 0.5000  gate not passed  ",
        ),
        (
            {"passed": False, "criteria": [], "failure_reason": "too few rule checks: 3"},
            "gate not passed: too few rule checks: 3  ",
        ),
    ],
    ids=["no evaluation", "another metric", "passed", "the figures say why", "the figures do not say why"],
)
def test_the_summary_of_an_epoch_repeats_nothing(capsys, evaluation, verdict):
    loop = Loop(
        Progress(
            {
                "edge_compliance": "edge",
                "rule_compliance": "rule",
                "sampled_rule_compliance": "sampled rule",
                "val_loss": "validation loss",
                "val_bits_per_byte": "bits per byte",
            },
            bars=False,
        )
    )
    loop.steps(5)
    capsys.readouterr()
    loop.end_epoch(**evaluation)
    assert capsys.readouterr().out == f"epoch      1/3  step  5/12  loss 0.4000  {verdict}0.0 s\n"


def test_the_summary_never_shows_the_loss_or_the_verdict_of_an_earlier_epoch(capsys):
    loop = Loop(
        Progress(
            {
                "edge_compliance": "edge",
                "rule_compliance": "rule",
                "sampled_rule_compliance": "sampled rule",
                "val_loss": "validation loss",
                "val_bits_per_byte": "bits per byte",
            },
            bars=False,
        )
    )
    loop.steps(5)
    loop.end_epoch(passed=True, criteria=[])
    loop.state.step += 5
    capsys.readouterr()
    loop.end_epoch()
    assert capsys.readouterr().out == "epoch      2/3  step 10/12  loss nan  0.0 s\n"
