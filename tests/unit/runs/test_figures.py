"""The figure of a run."""

import math

import pytest
from configs import experiment_config
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from accel_train.config.fields import from_dict
from accel_train.config.sections import TrainingConfig
from accel_train.runs.figures import running_mean, training_curves
from accel_train.runs.record import new_record
from accel_train.tasks.registry import build_task, config_class, task_class


def make_record(losses, evaluations, config=None):
    config = config or experiment_config()
    made = new_record(config, task_class(config.task))
    record = made.to_dict()
    record["curves"] |= {"train_loss": losses}
    if config.task == "walks":
        record["curves"] |= {"edge_compliance": evaluations, "rule_compliance": evaluations}
    if evaluations:
        record["gate"].update(passed=True, epoch=len(evaluations))
    return record


def draw(record, path):
    config = from_dict(record["config"], config_class(record["config"]["task"]))
    training_curves(build_task(config), record, path)


@pytest.mark.parametrize(
    ("losses", "evaluations"),
    [
        ([], []),
        ([2.0], []),
        ([2.0] * 10, [0.9]),
        ([2.0, None, 1.0] * 200, [None, 0.5, 1.0]),
        ([1.0] * 9000, [0.02 * i for i in range(50)]),
    ],
    ids=["nothing", "no evaluation", "one epoch", "missing values", "fifty epochs"],
)
@pytest.mark.filterwarnings("error")
def test_figure_is_drawn_for_every_length(tmp_path, losses, evaluations):
    path = tmp_path / "figures" / "training_curves.png"

    draw(make_record(losses, evaluations), path)

    with Image.open(path) as image:
        image.load()
        assert image.width > image.height > 300


def test_evaluations_between_epochs_are_drawn(tmp_path):
    config = experiment_config(training=TrainingConfig(eval_interval=5))
    draw(make_record([1.0] * 20, [0.1, 0.2], config), tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 0


@settings(deadline=None)  # a busy machine is no defect
@given(st.lists(st.floats(-1e3, 1e3), max_size=40), st.integers(1, 12))
def test_running_mean_is_the_mean_of_the_last_values(values, window):
    for index, mean in enumerate(running_mean(values, window)):
        last = values[max(0, index + 1 - window) : index + 1]
        assert mean == pytest.approx(sum(last) / len(last), abs=1e-9)


def test_running_mean_recovers_after_a_missing_value():
    means = running_mean([1.0, math.nan, 3.0, 5.0], 2)
    assert [means[0], means[3]] == [1.0, 4.0]
    assert math.isnan(means[1])
    assert math.isnan(means[2])


@pytest.mark.parametrize("evaluations", [0, 1, 40])
@pytest.mark.filterwarnings("error")
def test_the_figure_of_a_text_run_is_drawn_for_every_length(tmp_path, evaluations):
    record = make_record([5.0] * 300, [], experiment_config(task="text"))
    losses = [6.0 - 0.05 * number for number in range(evaluations)]
    record["curves"] |= {"val_loss": losses, "probe_loss": losses, "val_bits_per_byte": losses} if losses else {}
    path = tmp_path / "training_curves.png"

    draw(record, path)

    with Image.open(path) as image:
        assert image.size == (1430, 546)
