"""The record follows the training state, also through a resume; trackers are told the same."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from configs import experiment_config
from torch import nn

from accel_train.checkpoints.state import TrainingState
from accel_train.config.fields import to_dict
from accel_train.config.sections import TrainingConfig
from accel_train.process.fault_points import RECORD_WRITTEN_ASIDE
from accel_train.process.stopwatch import Stopwatch
from accel_train.process.work import SILENT, WorkContext
from accel_train.runs.directory import RunDirectory
from accel_train.runs.record import read_record
from accel_train.runs.recorder import Recorder, Trackers
from accel_train.tasks.registry import build_task
from accel_train.training.callbacks import LoopState
from accel_train.training.plan import Plan

CRITERION = {"metric": "edge_compliance", "op": ">", "threshold": 0.95, "value": 0.99, "passed": True}
EVALUATION = {
    "step": 2,
    "epoch": 1,
    "passed": True,
    "criteria": [CRITERION],
    "failure_reason": None,
    "metrics": {"edge_compliance": 0.99, "rule_compliance": 0.9},
    "evidence": {"rule_checks": 500},
}


class Trained:
    """What a recorder reads of a trainer."""

    def __init__(self, **state):
        self.state = TrainingState(**state)
        self.plan = Plan(TrainingConfig(batch_size=4, max_epochs=3), 8, 1, 0, 0)
        self.clock, self.tokens_at_start, self.unwrapped_model = Stopwatch(), 0, nn.Linear(2, 3)


@pytest.fixture
def directory(tmp_path):
    made = RunDirectory(experiment_config(output_dir=str(tmp_path), name="run"))
    made.open(SILENT, fresh=False)
    yield made
    made.close()


@pytest.fixture
def recorder(directory):
    return Recorder(directory, build_task(directory.config), ["train"], SILENT)


def following(recorder, trainer, found=None):
    recorder.start(found)
    recorder.follow(trainer, preflight={"reachable": True}, machine={"device": "cpu"}, hooks=["identity"])
    recorder.on_train_start(LoopState(step=trainer.state.step))
    return recorder


def test_a_started_run_is_recorded_as_running(directory, recorder):
    recorder.start(None)
    found = read_record(directory.path)
    assert (found.status, found.config_hash) == ("running", directory.config_hash)


def test_curves_scalars_and_verdict_are_those_of_the_state(directory, recorder):
    trainer = Trained(step=2, epoch=1, train_loss=[3.0, 2.0], tokens_seen=64, evaluations=[EVALUATION])
    following(recorder, trainer).on_epoch_end(LoopState())

    found = read_record(directory.path)
    assert found.curves["train_loss"] == [3.0, 2.0]
    assert (found.curves["edge_compliance"], found.curves["evaluation_step"]) == ([0.99], [2])
    assert found.metrics.scalars["final_rule_compliance"] == 0.9
    assert (found.metrics.scalars["epochs_trained"], found.metrics.scalars["parameters"]) == (1.0, 9)
    assert (found.gate.passed, found.gate.epoch, found.gate.first_passed_epoch) == (True, 1, 1)
    assert found.gate.criteria[0].model_dump() == CRITERION
    assert found.provenance.hook_list == ["identity"]


def test_the_first_pass_stays_when_a_later_verdict_fails(directory, recorder):
    later = {**EVALUATION, "step": 4, "epoch": 2, "passed": False, "failure_reason": "forgot it"}
    trainer = Trained(step=4, epoch=2, train_loss=[3.0] * 4, evaluations=[EVALUATION, later])
    following(recorder, trainer).on_epoch_end(LoopState())
    gate = read_record(directory.path).gate
    assert (gate.passed, gate.epoch, gate.failure_reason, gate.first_passed_epoch) == (False, 2, "forgot it", 1)


def test_a_verdict_that_was_rolled_back_goes(directory, recorder):
    trainer = Trained(step=2, epoch=1, train_loss=[3.0, 2.0], evaluations=[EVALUATION])
    following(recorder, trainer).finish("preempted", "a signal")
    assert read_record(directory.path).gate.passed
    again = Recorder(directory, build_task(directory.config), ["train"], SILENT)
    following(again, Trained(step=1, train_loss=[3.0]), read_record(directory.path))
    gate = read_record(directory.path).gate
    assert (gate.passed, gate.epoch, gate.criteria, gate.first_passed_epoch) == (None, None, [], None)
    assert read_record(directory.path).curves["train_loss"] == [3.0]


def test_an_evaluation_is_a_line_with_the_identity(directory, recorder):
    trainer = Trained(step=2, epoch=1, train_loss=[3.0, 2.0], evaluations=[EVALUATION])
    metrics = {"val_loss": 2.5}
    following(recorder, trainer).on_evaluate(LoopState(), {**EVALUATION, "metrics": metrics, "samples": ["one", "two"]})
    line = json.loads((directory.path / "metrics.jsonl").read_text())
    record = recorder.record
    assert line.pop("time")
    assert line == {
        "run_id": record.run_id,
        "config_hash": record.config_hash,
        "git_commit": record.provenance.git_commit,
        "step": 2,
        "epoch": 1,
        "gate_passed": True,
        "sample": "one",
        "loss": 2.0,
        "val_loss": 2.5,
    }
    assert (directory.path / "samples" / "step_0000002.txt").read_text() == "one\n\ntwo\n"


def test_a_column_without_a_figure_stands_as_null(directory, recorder):
    following(recorder, Trained()).on_epoch_end(LoopState())
    assert read_record(directory.path).metrics.scalars["final_edge_compliance"] is None


def test_the_conclusion_is_the_verdict(directory, recorder):
    trainer = Trained(step=2, epoch=1, train_loss=[3.0, 2.0], evaluations=[EVALUATION])
    following(recorder, trainer)
    recorder.conclude({**EVALUATION, "passed": False, "failure_reason": "too slow", "samples": ["a", "b"]})
    recorder.finish("completed", None)
    written = read_record(directory.path)
    assert (written.gate.passed, written.gate.failure_reason) == (False, "too slow")
    assert written.metrics.scalars["gate_passed"] is False
    assert "gate not passed after epoch 1: too slow" in recorder.summary()
    assert (directory.path / "samples" / "validation.txt").read_text() == "a\n\nb\n"


def test_lines_after_the_checkpoint_are_cut_on_resume(directory, recorder):
    following(recorder, Trained()).on_log(LoopState(), {"step": 1, "loss": 3.0})
    recorder.on_log(LoopState(), {"step": 2, "loss": 2.0})
    (directory.path / "samples").mkdir()
    (directory.path / "samples" / "step_0000002.txt").write_text("rolled back")
    again = Recorder(directory, build_task(directory.config), ["train"], SILENT)
    following(again, Trained(step=1, train_loss=[3.0]), read_record(directory.path))
    lines = [json.loads(line) for line in (directory.path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1]
    assert lines[0]["run_id"] == again.record.run_id == recorder.record.run_id
    assert again.record.provenance.launches == 2
    assert list((directory.path / "samples").iterdir()) == []


def test_the_line_of_an_evaluation_that_is_due_is_cut(directory, recorder):
    trainer = Trained(step=2, epoch=1, train_loss=[3.0, 2.0], evaluations=[EVALUATION])
    following(recorder, trainer).on_log(LoopState(), {"step": 2, "loss": 2.0})
    recorder.on_evaluate(LoopState(), EVALUATION)
    again = Recorder(directory, build_task(directory.config), ["train"], SILENT)
    due = Trained(step=2, epoch=1, train_loss=[3.0, 2.0], evaluation_due=True)
    following(again, due, read_record(directory.path))
    lines = [json.loads(line) for line in (directory.path / "metrics.jsonl").read_text().splitlines()]
    assert ["gate_passed" in line for line in lines] == [False]


def test_a_resume_says_which_steps_are_repeated(directory, recorder, capsys):
    following(recorder, Trained()).on_log(LoopState(), {"step": 4, "loss": 2.0})
    assert "resume" not in capsys.readouterr().out
    again = Recorder(directory, build_task(directory.config), ["train"], SILENT)
    following(again, Trained(step=2, train_loss=[3.0, 2.0]), read_record(directory.path))
    assert "after step 2; steps 3 to 4 were not saved and are repeated" in capsys.readouterr().out


def test_seconds_of_all_launches_add_up(directory, recorder):
    trainer = Trained(step=1, train_loss=[3.0], tokens_seen=10)
    trainer.clock.seconds["training"] = 2.0
    following(recorder, trainer).finish("preempted", "a signal")
    again = Recorder(directory, build_task(directory.config), ["train"], SILENT)
    following(again, trainer, read_record(directory.path)).finish("completed", None)
    assert again.record.timing.seconds["training"] == 4.0
    assert again.record.timing.tokens_per_second == 5.0


def test_marks_of_evaluations_that_were_rolled_back_go(directory, recorder):
    trainer = Trained(step=2, epoch=1, train_loss=[3.0, 2.0], evaluations=[EVALUATION])
    following(recorder, trainer).on_evaluate(LoopState(), EVALUATION)
    recorder.finish("preempted", "a signal")
    assert [mark["step"] for mark in read_record(directory.path).timing.evaluations] == [2]
    again = Recorder(directory, build_task(directory.config), ["train"], SILENT)
    following(again, Trained(step=1, train_loss=[3.0]), read_record(directory.path)).on_epoch_end(LoopState())
    assert again.record.timing.evaluations == []


def test_a_mark_counts_the_seconds_of_all_launches(directory, recorder):
    trainer = Trained(step=1, train_loss=[3.0])
    trainer.clock.seconds["training"] = 2.0
    following(recorder, trainer).finish("preempted", "a signal")
    resumed = Trained(step=2, epoch=1, train_loss=[3.0, 2.0])
    resumed.clock.seconds["training"] = 5.0
    again = Recorder(directory, build_task(directory.config), ["train"], SILENT)
    following(again, resumed, read_record(directory.path)).on_evaluate(LoopState(), EVALUATION)
    again.on_epoch_end(LoopState())
    assert read_record(directory.path).timing.evaluations == [{"step": 2, "training_seconds": 7.0}]


@pytest.mark.parametrize(
    ("status", "finished", "drawn"), [("completed", True, True), ("failed", True, True), ("preempted", False, False)]
)
def test_an_end_is_recorded_and_drawn(directory, recorder, status, finished, drawn):
    """A preempted run goes on later, and has no time for a figure."""
    following(recorder, Trained(step=1, train_loss=[3.0])).finish(status, "why")
    record = read_record(directory.path)
    assert (record.status, record.reason) == (status, "why")
    assert (record.finished_at is not None) == finished
    assert (directory.path / "figures" / "training_curves.png").exists() == drawn


def test_a_run_without_a_step_has_no_figure(directory, recorder):
    following(recorder, Trained()).finish("failed", "at once")
    assert read_record(directory.path).status == "failed"
    assert not (directory.path / "figures").exists()


def test_a_fault_while_writing_leaves_the_earlier_record(directory):
    class Killed(BaseException):
        pass

    def killed(point):
        if point == RECORD_WRITTEN_ASIDE and armed:
            raise Killed

    armed = False
    recorder = Recorder(directory, build_task(directory.config), ["train"], WorkContext(reached=killed))
    following(recorder, Trained(step=1, train_loss=[3.0]))
    armed = True
    with pytest.raises(Killed):
        recorder.finish("completed", None)
    assert read_record(directory.path).status == "running"


def test_a_completed_record_stays_as_it_is(directory, recorder):
    following(recorder, Trained()).finish("completed", None)
    before = (directory.path / "result.json").read_bytes()
    again = Recorder(directory, build_task(directory.config), ["another"], SILENT)
    again.start(read_record(directory.path))
    again.finish("failed", "nothing of the kind")
    assert (directory.path / "result.json").read_bytes() == before


def test_nothing_is_written_before_the_start(directory, recorder):
    recorder.finish("failed", "before the lock")
    assert not (directory.path / "result.json").exists()


def test_a_figure_that_cannot_be_drawn_is_a_warning(directory, recorder, caplog, monkeypatch):
    broken = SimpleNamespace(training_curves=lambda *_: 1 / 0)
    monkeypatch.setattr("accel_train.runs.recorder.importlib.import_module", lambda _name: broken)
    following(recorder, Trained(step=1, train_loss=[3.0])).finish("completed", None)
    assert "could not be drawn" in caplog.text
    assert read_record(directory.path).status == "completed"


# -- trackers ------------------------------------------------------------------------------


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
