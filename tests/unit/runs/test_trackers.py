"""What Accelerate's trackers are told."""

import pytest

from accel_train.config.fields import to_dict
from accel_train.runs.trackers import Trackers
from accel_train.tasks.registry import experiment_config
from accel_train.training.callbacks import LoopState


class Told:
    """An accelerator that only remembers what it is told."""

    def __init__(self):
        self.project, self.parameters, self.lines = None, None, []

    def init_trackers(self, project, parameters):
        self.project, self.parameters = project, parameters

    def log(self, figures, step):
        self.lines.append((step, figures))


@pytest.fixture
def told():
    return Told()


def test_hyperparameters_have_dotted_names(told):
    Trackers(told, "here", {"seed": 3, "training": {"learning_rate": 0.1, "deep": {"on": True}}})
    assert told.project == "here"
    assert told.parameters == {"seed": 3, "training.learning_rate": 0.1, "training.deep.on": True}


def test_what_trackers_cannot_store_becomes_text(told):
    Trackers(told, "here", {"name": None, "tags": ["a", "b"]})
    assert told.parameters == {"name": "None", "tags": "['a', 'b']"}


def test_every_value_of_a_configuration_is_plain(told):
    Trackers(told, "here", to_dict(experiment_config(tags=("x",))))
    assert told.parameters["walks.graph.n"] == 500
    assert {type(value) for value in told.parameters.values()} <= {int, float, str, bool}


def test_a_log_line_is_sent_under_its_step(told):
    line = {"step": 7, "loss": 2.5, "learning_rate": 0.1}
    Trackers(told, "here", {}).on_log(LoopState(step=9), line)
    assert told.lines == [(7, {"loss": 2.5, "learning_rate": 0.1})]
    assert line["step"] == 7, "other callbacks get the same line"


def test_an_evaluation_is_sent_without_missing_figures(told):
    evaluation = {"step": 4, "epoch": 1, "passed": False, "metrics": {"edge_compliance": 0.5, "rule_compliance": None}}
    Trackers(told, "here", {}).on_evaluate(LoopState(), evaluation)
    assert told.lines == [(4, {"edge_compliance": 0.5})]


def test_an_evaluation_without_figures_sends_none(told):
    Trackers(told, "here", {}).on_evaluate(LoopState(), {"step": 4, "epoch": 1})
    assert told.lines == [(4, {})]
