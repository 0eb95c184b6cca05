"""What a task has without saying anything, and what it must say."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
from matplotlib.figure import Figure

from accel_train.config.sections import experiment_class
from accel_train.errors import ConfigError
from accel_train.process.work import SILENT
from accel_train.tasks.base import Evaluation, GenerationOptions, Task, Trained
from accel_train.tasks.criteria import Criterion, judge


@dataclass(frozen=True)
class Section:
    """Of a task that does the least."""

    size: int = 3


class Least(Task):
    """Defines what every task must, and nothing else."""

    name = "least"
    Config = Section
    vocab_size = 5
    curves = ("accuracy",)

    def build(self, shared, work):
        return str(shared)

    def open(self, artifacts):
        return []

    def evaluate(self, model, losses, work):
        return Evaluation(None)


@pytest.fixture
def task():
    return Least(experiment_class("least", Section)())


@pytest.mark.parametrize("missing", ["vocab_size", "build", "open", "evaluate"])
def test_a_task_says_its_vocabulary_data_and_judgement(task, missing):
    said = {name: value for name, value in vars(Least).items() if name in Task.__abstractmethods__ - {missing}}
    with pytest.raises(TypeError, match=missing):
        type("Partial", (Task,), said)(task.config)


def test_exactly_four_things_must_be_said():
    assert Task.__abstractmethods__ == {"vocab_size", "build", "open", "evaluate"}


def test_a_task_has_its_configuration(task):
    assert task.config.section.size == 3


def test_a_task_without_more_data_has_none(task):
    task.check(SILENT)
    assert (task.validation(), task.digests(), task.files()) == ({}, {}, {})


def test_a_gate_that_says_nothing_can_be_reached(task):
    assert task.preflight(SILENT) == {"reachable": True, "warnings": []}


def test_the_last_evaluation_stands_by_default(task, tmp_path):
    trained = Trained(model=None, checkpoint=tmp_path, evaluation={}, epoch_losses=[])
    assert task.conclude(trained, SILENT) is None


def test_the_record_gets_nothing_beside_the_evaluation(task):
    assert task.scalars([{"step": 1, "epoch": 1.0, "metrics": {}}], []) == {}


def test_a_task_that_does_not_generate_says_so(task):
    with pytest.raises(ConfigError, match="RUN: 'least' is a task that does not generate"):
        task.generate(None, GenerationOptions())


def test_curves_are_drawn_with_the_thresholds_of_the_gate(task):
    axes = Figure().add_subplot()
    record = {
        "config": {"training": {"eval_interval": None}},
        "curves": {"accuracy": [0.5, 0.9], "train_loss": [1.0]},
        "gate": {"criteria": [{"metric": "accuracy", "threshold": 0.8}]},
    }
    task.draw(axes, record)
    assert [list(line.get_ydata()) for line in axes.lines] == [[0.8, 0.8], [0.5, 0.9]]


# -- when training ends --------------------------------------------------------------------


@dataclass(frozen=True)
class Gate:
    """A gate that can let training go on."""

    stop_on_pass: bool = False


@dataclass(frozen=True)
class Gated:
    """A section with a gate."""

    gate: Gate = field(default_factory=Gate)


def test_a_pass_ends_training_where_the_section_has_no_gate(task):
    assert task.stops_on_pass is True


@pytest.mark.parametrize("stops", [True, False])
def test_the_gate_of_the_section_says_whether_a_pass_ends_it(stops):
    config = SimpleNamespace(section=Gated(Gate(stops)))
    assert Least(config).stops_on_pass is stops


# -- what goes to and fro ------------------------------------------------------------------


def test_an_evaluation_without_a_verdict_is_its_metrics():
    assert Evaluation(None, {"loss": 1.0}).to_dict()["metrics"] == {"loss": 1.0}


def test_an_evaluation_with_a_verdict_has_the_metrics_of_that():
    verdict = judge([Criterion("loss", "<", 2.0)], {"loss": 1.0})
    found = Evaluation(verdict).to_dict()
    assert (found["passed"], found["metrics"]) == (True, {"loss": 1.0})


def test_options_that_were_not_given_are_left_out():
    assert GenerationOptions(num=2, temperature=0.0).given() == {"num": 2, "temperature": 0.0}
    assert GenerationOptions().given() == {}
