"""One judge for training, the end of a run, and whoever asks again."""

from pathlib import Path

import pytest
from torch import nn

from accel_train.process.work import SILENT
from accel_train.runs.judge import Judge, epoch_means
from accel_train.tasks.base import Evaluation
from accel_train.tasks.criteria import Criterion, judge


class Known:
    """A task whose model scores what it is told to."""

    def __init__(self, score, stops=True, concluded=None):
        self.score, self.stops_on_pass, self.concluded, self.trained = score, stops, concluded, None

    def evaluate(self, model, losses, work):
        return Evaluation(judge([Criterion("score", ">", 0.5)], {"score": self.score}))

    def conclude(self, trained, work):
        self.trained = trained
        return self.concluded


@pytest.mark.parametrize(("score", "stops", "stop"), [(0.9, True, True), (0.9, False, False), (0.1, True, False)])
def test_training_stops_on_a_pass_where_the_task_says_so(score, stops, stop):
    found = Judge(Known(score, stops)).evaluate(nn.Linear(1, 1), {}, SILENT)
    assert (found["passed"], found["stop"]) == (score > 0.5, stop)


def test_the_last_evaluation_stands_without_a_conclusion():
    task = Known(0.9)
    assert Judge(task).conclude(nn.Linear(1, 1), Path("c"), {"passed": True}, [2.0], SILENT) is None
    assert (task.trained.evaluation, task.trained.epoch_losses) == ({"passed": True}, [2.0])


def test_a_conclusion_is_json_values():
    concluded = Evaluation(None, {"cost": 1.0}, ["a sample"])
    found = Judge(Known(0.9, concluded=concluded)).conclude(nn.Linear(1, 1), Path("c"), {}, [], SILENT)
    assert found == {"metrics": {"cost": 1.0}, "samples": ["a sample"]}


def test_an_evaluation_without_a_verdict_never_stops_training():
    class Unjudged(Known):
        def evaluate(self, model, losses, work):
            return Evaluation(None, {"val_loss": losses["val"]})

    found = Judge(Unjudged(0.9)).evaluate(nn.Linear(1, 1), {"val": 2.5}, SILENT)
    assert found == {"metrics": {"val_loss": 2.5}, "stop": False}


@pytest.mark.parametrize(
    ("losses", "per_epoch", "means"), [([1.0, 3.0, 5.0], 2, [2.0]), ([], 2, []), ([1.0, 2.0], 1, [1.0, 2.0])]
)
def test_epoch_means_are_those_of_whole_epochs(losses, per_epoch, means):
    assert epoch_means(losses, per_epoch) == means
